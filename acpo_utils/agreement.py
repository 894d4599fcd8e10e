"""What a stage-1 run reports, keeps and copies: agreement with ratings, the best evaluator so far, its folders."""

import math
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import optimize

from acpo_utils.checkpoints import atomic_write
from acpo_utils.statistics import correlation


class Best:
    """Which validation of the current stage was best so far, and the sets' maps then; part of every checkpoint."""

    def __init__(self, stage: int = 1):
        self.stage, self.step, self.value, self.lines = stage, 0, -math.inf, [(1.0, 0.0)]

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def save_evaluator(model, folder: str | Path, **kwargs) -> None:
    """`model.save_pretrained`, beside `folder`, then renamed: `folder` is the old evaluator or the whole new one."""
    temporary, old = Path(f"{folder}.tmp"), Path(f"{folder}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(temporary, **kwargs)
    if Path(folder).exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def copy_evaluator(folder: str | Path, output_dir: str | Path) -> None:
    """What is in `folder`, but for its report, to `output_dir`. A copy: a checkpoint is resumed beside its `folder`."""

    def copy_file(source: str, target: str) -> None:
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)

    ignore = shutil.ignore_patterns("metrics.json")
    shutil.copytree(folder, output_dir, ignore=ignore, copy_function=copy_file, dirs_exist_ok=True)


def logistic_fit(prediction: Sequence[float], target: Sequence[float]) -> np.ndarray:
    """`prediction` (n,) through the monotonic logistic of four parameters that comes closest to `target` (n,).

    f(x) = b2 + (b1 - b2) / (1 + exp(-(x - b3) / |b4|)), of the Video Quality Experts Group's report of 2000, by least
    squares: what quality assessment puts before PLCC and RMSE, so that an evaluator is not blamed for its scale.
    Where no fit is found the predictions come back as they are.
    """
    x, y = np.asarray(prediction, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if len(x) < 5 or np.ptp(x) == 0:
        return x

    def curve(x, b1, b2, b3, b4):
        return b2 + (b1 - b2) / (1 + np.exp(-np.clip((x - b3) / max(abs(b4), 1e-12), -60, 60)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optimize.OptimizeWarning)  # of the covariance, which nobody reads
        try:
            fitted, _ = optimize.curve_fit(curve, x, y, p0=(y.max(), y.min(), x.mean(), x.std()), maxfev=20_000)
        except RuntimeError:
            return x
    return curve(x, *fitted)


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
