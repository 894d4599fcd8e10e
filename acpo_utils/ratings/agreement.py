"""How well an evaluator's scores agree with people's ratings: correlations, shares of pairs, a scatter plot, tables."""

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import optimize

from acpo_utils.files import atomic_write
from acpo_utils.statistics import correlation


def logistic_fit(prediction: Sequence[float], target: Sequence[float]) -> np.ndarray:
    """`prediction` (n,) through the monotonic logistic of four parameters that comes closest to `target` (n,).

    f(x) = b2 + (b1 - b2) / (1 + exp(-(x - b3) / |b4|)), of the Video Quality Experts Group's report of 2000, by least
    squares: what quality assessment puts before PLCC and RMSE, so that an evaluator is not blamed for its scale.
    Where no fit is found the predictions come back as they are.
    """
    x, y = np.asarray(prediction, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if len(x) < 5 or np.ptp(x) == 0:
        return x
    centre, spread = y.mean(), y.std() or 1.0
    x_units, y_units = (x - x.mean()) / x.std(), (y - centre) / spread

    def curve(x, b1, b2, b3, b4):
        return b2 + (b1 - b2) / (1 + np.exp(-np.clip((x - b3) / max(abs(b4), 1e-12), -60, 60)))

    start = (y_units.max(), y_units.min(), 0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optimize.OptimizeWarning)  # of the covariance, which nobody reads
        try:
            # Not curve_fit's own choice, "lm": in SciPy 1.17 the result depends, a little, on what memory held before.
            fitted, _ = optimize.curve_fit(
                curve, x_units, y_units, p0=start, method="trf", x_scale="jac", max_nfev=2000
            )
        except RuntimeError:
            return x
    return curve(x_units, *fitted) * spread + centre


def agreement(prediction: Sequence[float], target: Sequence[float]) -> dict[str, float]:
    """`correlation` of both (n,), and `plcc_logistic` and `rmse_logistic` of the predictions after `logistic_fit`.

    `prediction` and `target` are on one scale; n >= 2. `count` is n. Raises ValueError as `correlation` does.
    """
    metrics = {"count": len(target)} | correlation(prediction, target)
    fitted = correlation(logistic_fit(prediction, target), target)
    return metrics | {"plcc_logistic": fitted["plcc"], "rmse_logistic": fitted["rmse"]}


def agreement_by_group(
    prediction: Sequence[float], target: Sequence[float], groups: Sequence
) -> dict[str, dict[str, float]]:
    """`agreement` within each value of `groups` (n,) that has two rows or more, by name; one row has no rank."""
    prediction, target = np.asarray(prediction), np.asarray(target)
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(str(group), []).append(row)
    return {name: agreement(prediction[rows], target[rows]) for name, rows in sorted(members.items()) if len(rows) > 1}


def logistic_table(parts: dict[str, dict[str, float]]) -> str:
    """Markdown, one line for each of `parts` (name: `agreement`)."""
    lines = [
        "| rows | number | SRCC | PLCC, logistic fit | PLCC | KRCC | RMSE, logistic fit | RMSE |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        keys = ("srcc", "plcc_logistic", "plcc", "krcc", "rmse_logistic", "rmse")
        lines.append(f"| {name} | {part['count']} | {' | '.join(f'{part[key]:.3f}' for key in keys)} |")
    return "\n".join(lines)


def matched_above_mismatched(
    images: Sequence[dict], mismatches: Sequence[str | None], scores: Sequence[float]
) -> dict[str, dict]:
    """Over all pairs (own prompt, wrong prompt) of one picture: the share in which the own prompt scores higher.

    `images`: (n,) undecoded cells {"bytes", "path"}; pictures are told apart by their bytes. `mismatches`: None, "" or
    "none" for a picture's own prompt, otherwise what is wrong with the prompt. Returns {"share", "pairs"} for each kind
    of mismatch and for "any" of them; {} if there is no pair.
    """
    pictures = defaultdict(lambda: ([], []))
    for cell, mismatch, score in zip(images, mismatches, scores):
        key = hashlib.sha256(cell["bytes"] or Path(cell["path"]).read_bytes()).digest()
        if mismatch in (None, "", "none"):
            pictures[key][0].append(score)
        else:
            pictures[key][1].append((mismatch, score))
    wins = defaultdict(list)
    for matched, mismatched in pictures.values():
        for own in matched:
            for kind, score in mismatched:
                wins[kind].append(own > score)
                wins["any"].append(own > score)
    return {kind: {"share": sum(won) / len(won), "pairs": len(won)} for kind, won in sorted(wins.items())}


def save_scatter(
    path: str | Path, mos: Sequence[float], predictions: Sequence[float], scale: Sequence[float], title: str
) -> None:
    """A square picture of `predictions` (n,) over `mos` (n,), both on `scale` (lowest, highest)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    axis.scatter(mos, predictions, s=6, alpha=0.4, linewidths=0)
    axis.plot(scale, scale, color="grey", linewidth=1)
    axis.set(xlabel="mean opinion score", ylabel="prediction", xlim=scale, ylim=scale, aspect="equal", title=title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def agreement_table(parts: dict[str, dict]) -> str:
    """Markdown, one line for each of `parts` (name: `acpo_utils.ratings.agreement.agreement`, and pairs where there are any)."""
    lines = [
        "| rows | number | SRCC | PLCC, logistic fit | PLCC | KRCC | RMSE | own prompt above wrong ones |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        shares = [f"{kind} {100 * pair['share']:.1f} %" for kind, pair in part.get("pairs", {}).items()]
        numbers = " | ".join(f"{part[key]:.3f}" for key in ("srcc", "plcc_logistic", "plcc", "krcc", "rmse"))
        lines.append(f"| {name} | {part['count']} | {numbers} | {', '.join(shares)} |")
    return "\n".join(lines)
