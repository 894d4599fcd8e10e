"""The table of an ablation: of each row and metric the means over seeds, with a t-interval; markdown, csv and json."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from acpo_utils.files import aligned_table, atomic_write, write_csv


FIELDS = (
    "row",
    "metric",
    "base_mean",
    "finetuned_mean",
    "mean_difference",
    "interval_low",
    "interval_high",
    "runs",
    "failed",
)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of (n,) values and Student's t-interval of it, n - 1 degrees of freedom; nan bounds for a single value.

    Raises ValueError for no value, or one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"expected a list of finite values, found {values.tolist()}")
    mean = float(values.mean())
    if len(values) == 1:
        return mean, math.nan, math.nan
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return mean, mean - float(half), mean + float(half)


def read_metrics(path: str | Path) -> dict[str, dict[str, float]]:
    """{metric: {"base", "finetuned", "difference"}} of a script's metrics.json; "finetuned" alone where there is no base.

    Understood are the comparisons of train_acpo_lora_sd.py and train_acpo_ddpm.py, the latter's metrics of whole sets
    and its summary of a model trained from scratch; of any other file the numbers, named by their place in it, down to
    the second level. What is not finite is left out.

    Raises ValueError if the file is not JSON, or no object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        found = _metrics(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or of unknown form: {error}") from error
    return {name: values for name, values in found.items() if all(map(math.isfinite, values.values()))}


def _metrics(content: dict) -> dict[str, dict[str, float]]:
    def pair(base: float, finetuned: float) -> dict[str, float]:
        return {"base": base, "finetuned": finetuned, "difference": finetuned - base}

    if "comparisons" not in content and "summary" not in content:
        nested = {
            f"{outer} {name}": value
            for outer, part in content.items()
            if isinstance(part, dict)
            for name, value in part.items()
        }
        numbers = {name: value for name, value in (content | nested).items() if type(value) in (int, float)}
        return {name: {"finetuned": value} for name, value in numbers.items()}
    found = {name: {"finetuned": row["mean"]} for name, row in content.get("summary", {}).items()}
    for part in ("comparisons", "panel"):
        found |= {n: pair(row["base_mean"], row["finetuned_mean"]) for n, row in content.get(part, {}).items()}
    for name, value in content.get("sets", {}).items():  # (mean, spread), one of each model
        found[name] = (
            pair(value["base"][0], value["finetuned"][0]) if isinstance(value, dict) else {"finetuned": value[0]}
        )
    return found


def summarise_rows(metrics: dict[str, Sequence[dict]], failed: dict[str, int]) -> list[dict]:
    """One line, with the names of `FIELDS`, for each row and metric; what cannot be computed is None.

    Args:
        metrics: {row: [what `read_metrics` returned, for each finished run]}, in the table's order. A metric that some
            runs lack is taken over those that have it; `runs` counts them.
        failed: {row: number of runs that failed}.
    Returns:
        The interval is of the difference; of metrics without a base, of the fine-tuned mean. A row with no finished
        run has one line, of metric None.
    """
    lines = []
    for row, runs in metrics.items():
        names = list(dict.fromkeys(name for run in runs for name in run)) or [None]
        for name in names:
            values = [run[name] for run in runs if name in run]
            line = dict.fromkeys(FIELDS) | {
                "row": row,
                "metric": name,
                "runs": len(values),
                "failed": failed.get(row, 0),
            }
            for field, key in (
                ("base_mean", "base"),
                ("finetuned_mean", "finetuned"),
                ("mean_difference", "difference"),
            ):
                if values and all(key in value for value in values):  # the last one's interval stays
                    line[field], low, high = mean_interval([value[key] for value in values])
                    if key != "base":
                        line |= {"interval_low": _number(low), "interval_high": _number(high)}
            lines.append(line)
    return lines


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def ablation_table(lines: Sequence[dict]) -> str:
    """The lines of `summarise_rows` as a markdown table (`aligned_table`)."""

    def text(value: float | None, sign: str = "") -> str:
        if value is None:
            return "–"
        return format(value, f"{sign}.4f" if value == 0 or abs(value) >= 1e-3 else f"{sign}.1e")

    cells = [["row", "metric", "base", "fine-tuned", "difference", "95 % interval", "runs", "failed"]]
    for line in lines:
        sign = "" if line["mean_difference"] is None else "+"
        interval = [line["interval_low"], line["interval_high"]]
        interval = "–" if None in interval else f"[{text(interval[0], sign)}, {text(interval[1], sign)}]"
        means = [text(line["base_mean"]), text(line["finetuned_mean"]), text(line["mean_difference"], "+")]
        cells.append([line["row"], line["metric"] or "–", *means, interval, str(line["runs"]), str(line["failed"])])
    return aligned_table(cells, text_columns=2)


def ablation_notes(lines: Sequence[dict], failures: dict[str, str]) -> str:
    """What stands below the table: how to read the interval, and {run: why it failed}."""
    single = any(line["runs"] == 1 for line in lines)
    based = any(line["mean_difference"] is not None for line in lines)
    alone = any(line["mean_difference"] is None and line["runs"] for line in lines)
    what = [
        text for text, there in (("of the difference", based), ("of the mean where there is no base", alone)) if there
    ]
    texts = [f"Interval: {', '.join(what)}; Student's t over seeds."] if what else []
    texts += ["A row with one run has no interval."] if single else []
    texts += [f"Failed: {run}: {reason}" for run, reason in failures.items()]
    return "\n\n".join(texts)


def write_ablation_tables(folder: str | Path, lines: Sequence[dict], title: str, below: str, results: dict) -> None:
    """Writes table.md (`title`, table, `below`), table.csv and results.json (`results` and the table's lines)."""
    folder = Path(folder)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(f"{title}\n\n{ablation_table(lines)}\n\n{below}\n", encoding="utf-8")
    write_csv(folder / "table.csv", FIELDS, lines)
    with atomic_write(folder / "results.json") as temporary:
        text = json.dumps(results | {"table": list(lines)}, indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
