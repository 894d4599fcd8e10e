"""The HTML report of an evaluation: one file that opens offline, beside the images it shows.

The page is report.html.jinja, with report.css and report.js in it; what is shown there is put together here.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np

from acpo_utils.evaluation.table import evaluation_notes, table_cells
from acpo_utils.files import atomic_write


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(folder: str | Path, results: dict) -> Path:
    """Writes `folder/report.html`, of what is in `folder/results.json`: table, distributions, grids, every pair.

    Images are named relative to `folder`; no script, font or style comes from elsewhere. Without JavaScript everything
    is shown, in the order of the prompts.
    """
    models = list(results["images"])
    tuned = [model for model in models if model != "base"]
    settings = results["settings"]
    base = "/".join(Path(settings["pretrained_model_name_or_path"]).parts[-2:])
    header, *lines = table_cells(results["rows"])
    page = TEMPLATES.get_template("report.html.jinja").render(
        title=f"{', '.join(tuned)} against {base}",
        header=header,
        text_columns=header.index("metric") + 1,
        rows=[{"cells": line, "guide": row["guide"]} for line, row in zip(lines, results["rows"])],
        notes=[line for line in evaluation_notes(results).split("\n") if line],
        distributions=_distributions(results["scores"], tuned),
        grids=[{"path": path, "name": Path(path).stem} for path in results["grids"]],
        changes={
            _change_name(metric, model): _changes(values, model)
            for metric, values in results["scores"].items()
            for model in tuned
        },
        columns=len(models) + any(results.get("real_images") or []),
        pairs=_pairs(results),
        settings={name: _setting(value) for name, value in settings.items() if value not in (None, [])},
    )
    path = Path(folder) / "report.html"
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def histogram(series: dict[str, Sequence[float]], bins: int = 24, zero: bool = False) -> str:
    """An inline SVG: the counts of each series, drawn over one another in classes `base` and `tuned`.

    `zero` marks where the values change their sign.
    """
    width, height, floor = 260, 110, 92
    values = np.concatenate([np.asarray(list(part), dtype=np.float64) for part in series.values()])
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = {name: np.histogram(part, bins, (low, high))[0] for name, part in series.items()}
    top = max(1, max(int(count.max()) for count in counts.values()))
    edges = np.linspace(low, high, bins + 1)
    kinds = ("base", "tuned") if len(series) > 1 else ("tuned",)
    bars = [
        {
            "kind": kind,
            "x": i * width / bins,
            "width": width / bins - 1,
            "height": floor * n / top,
            "label": f"{name}: {n} from {edges[i]:.4g} to {edges[i + 1]:.4g}",
        }
        for kind, (name, count) in zip(kinds, counts.items())
        for i, n in enumerate(count.tolist())
        if n
    ]
    return TEMPLATES.get_template("histogram.svg.jinja").render(
        width=width,
        height=height,
        floor=floor,
        bars=bars,
        low=low,
        high=high,
        zero=width * -low / (high - low) if zero and low < 0 < high else None,
    )


def _change_name(metric: str, model: str) -> str:
    return f"{metric}: change by {model}"


def _changes(values: dict[str, list[float]], model: str) -> list[float]:
    return [round(tuned - base, 6) for base, tuned in zip(values["base"], values[model])]


def _distributions(scores: dict, tuned: list[str]) -> list[dict]:
    return [
        {
            "title": f"{metric}, {model}",
            "scores": histogram({"base": values["base"], model: values[model]}),
            "change": histogram({"change": _changes(values, model)}, zero=True),
        }
        for metric, values in scores.items()
        for model in tuned
    ]


def _pairs(results: dict) -> list[dict]:
    pairs = []
    real = results.get("real_images") or [None] * len(results["prompts"])
    for i, prompt in enumerate(results["prompts"]):
        scores = {}
        for metric, values in results["scores"].items():
            decimals = _decimals(values)
            scores[metric] = [_score(of_model[i], values["base"][i], decimals) for of_model in values.values()]
        pairs.append(
            {
                "prompt": prompt["text"] or f"{prompt['set']} {prompt['row']}",
                "real": real[i],
                "images": {model: files[i] for model, files in results["images"].items()},
                "scores": scores,
            }
        )
    return pairs


def _score(value: float, base: float, decimals: int) -> dict[str, str]:
    change = value - base
    return {
        "value": f"{value:.{decimals}f}",
        "change": f"{change:+.{decimals}f}" if change else "",
        "kind": "up" if change > 0 else "down",
    }


def _decimals(values: dict[str, list[float]]) -> int:
    """As many as give the largest value of a metric four digits."""
    largest = max(abs(value) for of_model in values.values() for value in of_model)
    return max(0, 4 - math.ceil(math.log10(largest))) if largest else 0


def _setting(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
