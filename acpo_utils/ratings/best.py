"""The best evaluator of a stage, which validation chooses and the next stage starts from: which one it is, and its folder."""

import math
import os
import shutil
from pathlib import Path

from acpo_utils.files import atomic_write


def best_folder(args, number: int) -> Path:
    """Where the best evaluator of stage `number` is kept while it trains; of one of --stages also when it is finished."""
    return Path(args.output_dir, f"stage-{number}" if args.stages else "best")


class Best:
    """Which validation of the current stage was best so far, and the sets' maps then; part of every checkpoint.

    `step` is 0 before the first validation; `value` is None until one had scores that can be ranked.
    """

    def __init__(self, stage: int = 1):
        self.stage, self.step, self.value, self.lines = stage, 0, None, [(1.0, 0.0)]

    def improve(self, step: int, measured: dict[str, dict], lines: list[tuple[float, float]]) -> bool:
        """Whether the validation at `step` is the best so far; it is kept then, with the maps' `lines`.

        What counts is (SRCC + PLCC) / 2, averaged over the sets of `measured` (name: `agreement`). The first validation
        is the best of one, also if its scores are constant, which have no rank.
        """
        value = sum(metrics["srcc"] + metrics["plcc"] for metrics in measured.values()) / (2 * len(measured))
        value = None if math.isnan(value) else value  # nothing is above nan
        if self.step and (value is None or (self.value is not None and value <= self.value)):
            return False
        self.step, self.value, self.lines = step, value, lines
        return True

    def begin(self, stage: int) -> None:
        """Nothing is known of `stage` yet."""
        vars(self).update(vars(Best(stage)))

    def check_folder(self, checkpoint: Path, folder: Path) -> None:
        """Raises ValueError if `folder` is not there, with the evaluator that goes with `checkpoint`."""
        if self.step and not folder.is_dir():
            raise ValueError(
                f"{checkpoint} goes with the evaluator of step {self.step} in {folder}, which is missing."
            )

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state, lines=[tuple(line) for line in state["lines"]])


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
