"""Pictures of an ablation: every row beside the others, and each metric against the values of a swept flag."""

from collections.abc import Sequence
from pathlib import Path

from acpo_utils.files import atomic_write


def plot_rows(path: str | Path, lines: Sequence[dict]):
    """Writes a picture with one panel for each metric: its mean in every row, with the interval over seeds.

    `lines` are of `acpo_utils.ablations.table.summarise_rows`. Returns the matplotlib Figure; nothing is written, and
    None returned, if no run has finished.
    """
    rows = list(dict.fromkeys(line["row"] for line in lines))
    metrics = _metrics(lines)
    if not metrics:
        return None
    figure, axes = new_panels(len(metrics), 3.6, 0.9 + 0.32 * len(rows), sharey=True)
    for axis, metric in zip(axes, metrics):
        for line in lines:
            if line["metric"] == metric:
                mean, below, above = _bar(line)
                y = rows.index(line["row"])
                axis.errorbar(mean, y, xerr=[[below], [above]], fmt="o", color="C0", capsize=3, markersize=5)
        _label(axis, metric, lines, "x")
        axis.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
        axis.set_yticks(range(len(rows)), [_shorten(row) for row in rows])
    return save_figure(figure, path)


def plot_sweep(path: str | Path, flag: str, sweep: dict[str, list[tuple[str, str]]], lines: Sequence[dict]):
    """Writes a picture of each metric against the values of `flag`, one line of the plot for each of `sweep`.

    Args:
        sweep: {line: [(value, row's name), ...]}, of `acpo_utils.ablations.grid.sweeps`.
        lines: of `acpo_utils.ablations.table.summarise_rows`.
    The axis is logarithmic where the values span a decade (linear around a 0 among them), and takes the values in
    their given order if they are no numbers. Returns as `plot_rows` does.
    """
    from matplotlib.transforms import ScaledTranslation

    metrics = _metrics(lines)
    if not metrics:
        return None
    values = list(dict.fromkeys(value for points in sweep.values() for value, _ in points))
    numbers = _as_numbers(values)
    position = dict(zip(values, numbers or range(len(values))))
    figure, axes = new_panels(len(metrics), 4.2, 3.2)
    for axis, metric in zip(axes, metrics):
        of_row = {line["row"]: line for line in lines if line["metric"] == metric}
        for k, (name, points) in enumerate(sweep.items()):
            points = sorted((position[value], _bar(of_row[row])) for value, row in points if row in of_row)
            if not points:
                continue
            x, bars = zip(*points)
            means, below, above = zip(*bars)
            # Intervals of several lines at one value stand side by side.
            aside = ScaledTranslation((k - (len(sweep) - 1) / 2) * 5 / 72, 0, figure.dpi_scale_trans)
            axis.errorbar(
                x,
                means,
                yerr=[below, above],
                label=name,
                transform=axis.transData + aside,
                fmt="o-" if numbers else "o",
                color=f"C{k % 10}",
                capsize=3,
                markersize=5,
            )
            # What is drawn aside is not counted when the limits are chosen.
            axis.update_datalim([(at, mean + end) for at, (mean, low, high) in points for end in (-low, high)])
        _label(axis, metric, lines, "y")
        _scale(axis, numbers)
        axis.set_xticks([position[value] for value in values], [_shorten(value, 24) for value in values])
        axis.minorticks_off()
        axis.set_xlabel(flag)
        axis.margins(0.12)
        axis.autoscale_view()
    if len(sweep) > 1:
        handles, labels = max((axis.get_legend_handles_labels() for axis in axes), key=lambda found: len(found[1]))
        if handles:
            columns = min(len(labels), 3)
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return save_figure(figure, path)


def _metrics(lines: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(line["metric"] for line in lines if line["metric"]))


def _bar(line: dict) -> tuple[float, float, float]:
    """What is plotted, the difference or else the mean, and how far its interval reaches below and above."""
    mean = line["finetuned_mean"] if line["mean_difference"] is None else line["mean_difference"]
    if line["interval_low"] is None:
        return mean, 0.0, 0.0
    return mean, mean - line["interval_low"], line["interval_high"] - mean


def _as_numbers(values: Sequence[str]) -> list[float] | None:
    try:
        return [float(value) for value in values]
    except ValueError:
        return None


def _scale(axis, numbers: Sequence[float] | None) -> None:
    positive = [number for number in numbers or [] if number > 0]
    if not positive or min(numbers) < 0 or max(positive) < 10 * min(positive):
        return
    if min(numbers) > 0:
        axis.set_xscale("log")
    else:
        axis.set_xscale("symlog", linthresh=min(positive))


def new_panels(number: int, width: float, height: float, sharey: bool = False):
    """A matplotlib Figure and its `number` axes, three beside each other at most, of `width` x `height` inches each."""
    from matplotlib.figure import Figure

    columns = 2 if number == 4 else min(number, 3)
    rows = -(-number // columns)
    figure = Figure(figsize=(width * columns + 0.8, height * rows + 0.5), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat
    for axis in axes[number:]:
        axis.set_axis_off()
    return figure, axes[:number]


def _label(axis, metric: str, lines: Sequence[dict], along: str) -> None:
    """Title, name of the axis `along` which the metric is, and where "no change" is."""
    based = any(line["mean_difference"] is not None for line in lines if line["metric"] == metric)
    axis.set_title(metric.replace("$", r"\$"), fontsize=10)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)
    name = "fine-tuned minus base" if based else "mean"
    if along == "x":
        axis.set_xlabel(name)
        no_change = axis.axvline
    else:
        axis.set_ylabel(name)
        no_change = axis.axhline
    if based:
        no_change(0, color="black", linewidth=0.8, linestyle="--")


def _shorten(text: str, length: int = 44) -> str:
    text = text if len(text) <= length else f"{text[: length - 1]}…"
    return text.replace("$", r"\$")


def save_figure(figure, path: str | Path):
    """Writes `figure` to `path`, whole or not at all, and returns it."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
    return figure
