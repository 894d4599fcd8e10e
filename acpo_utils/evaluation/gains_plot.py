"""What a gain of the guide was worth to everything else: a picture with a point for each compared model."""

from collections.abc import Sequence
from pathlib import Path

from acpo_utils.files import atomic_write


COLUMNS = 5
DOWN, UP = "\u2193", "\u2191"


def gains_plot(path: str | Path, rows: Sequence[dict]) -> None:
    """Writes a picture: for each metric its change in % over that of the first metric, as a rule the guide.

    Changes are those of means, base to fine-tuned; an arrow beside a metric's name says which way is better, and whiskers
    are the rows' intervals where they have any. `rows`: of an evaluation, as in its results.json. Of one prompt set, the
    first one. Nothing is written for fewer than two models or two metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    prompts = rows[0]["prompts"] if rows else None
    changes: dict[str, dict[str, dict]] = {}  # {metric: {model: row}}
    for row in rows:
        if row["prompts"] == prompts and row["base_mean"]:
            changes.setdefault(row["metric"], {})[row["model"]] = row
    guide, *others = changes or [None]
    models = list(changes.get(guide, ()))
    if len(models) < 2 or not others:
        return
    lines = -(-len(others) // COLUMNS)
    figure, axes = plt.subplots(
        lines, COLUMNS, figsize=(2.8 * COLUMNS, 2.5 * lines + 0.9), layout="constrained", squeeze=False, sharex=True
    )
    handles = {}
    for axis, metric in zip(axes.flat, others):
        for number, model in enumerate(models):
            if model not in changes[metric]:
                continue
            row = changes[metric][model]
            handles[model] = axis.errorbar(
                change(changes[guide][model]),
                change(row),
                yerr=whiskers(row),
                fmt="osD^vP"[number // 10 % 6],
                color=f"C{number % 10}",
                markersize=5,
                linewidth=0.8,
            )
        axis.axhline(0, color="grey", linewidth=0.6)
        row = changes[metric][models[0]]
        title = f"{metric} {DOWN if row['lower_is_better'] else UP}"
        if row.get("real_mean") is not None:  # neither more nor less is better
            title = f"{metric} (dotted: real images)"
            axis.axhline(change(row | {"finetuned_mean": row["real_mean"]}), color="green", linestyle=":")
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8, labelbottom=True)
    for axis in axes.flat[len(others) :]:
        axis.set_axis_off()
    figure.suptitle(f"change of the mean in %, over that of {guide} in %", fontsize=10)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=COLUMNS, fontsize=8, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def change(row: dict) -> float:
    """How far the fine-tuned mean is from the base's, in % of it."""
    return 100 * (row["finetuned_mean"] - row["base_mean"]) / abs(row["base_mean"])


def whiskers(row: dict) -> list[list[float]] | None:
    """Below and above of `change`, where the row has an interval of it."""
    if row.get("change_low") is None:
        return None
    below, above = row["change"] - row["change_low"], row["change_high"] - row["change"]
    return [[100 * max(below, 0.0)], [100 * max(above, 0.0)]]
