"""Stage 1 of ACPO in several stages of rating sets, each starting from the weights that the last one arrived at.

The paper pre-trains its evaluators in three stages and does not describe them; docs/evaluators.md has our reading. Here
is what the training scripts of the evaluators share: the `--stages` flag, the rows of a stage, and the maps that let
sets rated on different scales teach one score.
"""

import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch

from acpo_utils.checkpoints import read_run_state
from acpo_utils.data.captioned import check_images
from acpo_utils.files import atomic_write
from acpo_utils.ratings.sets import SETS, RatingSet, read_rating_set
from acpo_utils.ratings.tables import Scale


EXAMPLE = '"agiqa-3k:PATH" or "agiqa-3k:PATH+aigciqa2023:PATH"'


@dataclass(frozen=True)
class Stage:
    """The rows that one stage trains on.

    Attributes:
        names: of its sets, each different: what reports and files call them.
        scales: lowest and highest score of each set.
        splits: train, validation and test, with the rows of all sets. Columns `image` (undecoded: rows of {"bytes",
            "path"}), `prompt`, `mos` (on the scale of its set) and `set` (index into `names`); from a rating set also
            quality, alignment, std and generator (see `RatingSet`).
    """

    names: tuple[str, ...]
    scales: tuple[Scale, ...]
    splits: datasets.DatasetDict

    def of_set(self, split: str, index: int) -> list[int]:
        """Which rows of `split` belong to set number `index`, in order. With one set: all of them."""
        if len(self.names) == 1:
            return list(range(len(self.splits[split])))
        return [row for row, number in enumerate(self.splits[split]["set"][:]) if number == index]


def parse_stages(specs: Sequence[str]) -> list[list[tuple[str, str]]]:
    """What `--stages` says, for each stage its sets as (name, path): `NAME:PATH`, several joined by `+`.

    Raises ValueError, in one line, for a set without path, an unknown set, or no stage at all.
    """
    if not specs:
        raise ValueError(f"--stages: expected at least one stage such as {EXAMPLE}, found none.")
    stages = []
    for spec in specs:
        stages.append([])
        for part in re.split(r"\+(?=[\w-]+:)", spec):  # a + that no NAME: follows belongs to a path
            name, _, path = part.partition(":")
            if name.lower() not in SETS or not path:
                found = f"the unknown set {name!r}" if path else f"{part!r} without a path"
                known = ", ".join(SETS)
                raise ValueError(f"--stages {spec!r}: expected {EXAMPLE} (sets: {known}), found {found}.")
            stages[-1].append((name.lower(), path))
    return stages


def value_per_stage(flag: str, values: Sequence, number: int) -> list:
    """`values` of `flag` for `number` stages: one value counts for all of them. Raises ValueError for other numbers."""
    if len(values) not in (1, number):
        found = " ".join(map(str, values))
        raise ValueError(f"--{flag}: expected one value, or one for each of the {number} stages, found {found}.")
    return list(values) * (number if len(values) == 1 else 1)


def read_stages(
    specs: Sequence[str],
    targets: Sequence[str] = ("quality",),
    split_seed: int = 0,
    csv_scale: Scale = (0.0, 5.0),
    skip_bad_images: bool = False,
    max_samples: dict[str, int | None] | None = None,
) -> list[Stage]:
    """The stages of `--stages`, read and checked whole before any training, down to every image.

    `targets`: which score is learned, quality, alignment (also called correspondence) or authenticity; one, or one for
    each stage. `csv_scale`: lowest and highest score of sets that are a plain csv. `max_samples`: the most rows of a
    set in a split, {"train": 100}; a random choice by `split_seed`. Otherwise as in `read_rating_set`.

    Raises ValueError, in one line, for what `parse_stages`, `read_rating_set` and `check_images` refuse, and for a
    split of a set with fewer than two different scores.
    """
    parsed = parse_stages(specs)
    targets = value_per_stage("target", targets, len(parsed))
    return [
        join_sets(
            [
                read_rating_set(
                    name, path, target=target, split_seed=split_seed, scale=csv_scale if name == "csv" else None
                )
                for name, path in stage
            ],
            [Path(path).stem if name == "csv" else SETS[name].name for name, path in stage],
            skip_bad_images=skip_bad_images,
            max_samples=max_samples or {},
            seed=split_seed,
        )
        for stage, target in zip(parsed, targets)
    ]


def join_sets(
    sets: Sequence[RatingSet],
    names: Sequence[str],
    skip_bad_images: bool = False,
    max_samples: dict[str, int | None] | None = None,
    seed: int = 0,
) -> Stage:
    """One stage of `sets`; a name that is there already gets a number. Arguments and errors as in `read_stages`."""
    names = [name if name not in names[:i] else f"{name}-{i + 1}" for i, name in enumerate(names)]
    splits = {}
    for split in ("train", "validation", "test"):
        parts = []
        for index, (name, rated) in enumerate(zip(names, sets)):
            rows, limit = rated.splits[split], (max_samples or {}).get(split)
            if limit is not None and limit < len(rows):
                rows = rows.shuffle(seed=seed).select(range(limit))
            rows = rows.cast_column("image", datasets.Image(decode=False))
            rows = check_images(rows, "image", skip_bad_images)
            if split != "train" and len(set(rows["mos"][:])) < 2:
                raise ValueError(f"{name}, {split}: expected two different scores to rank, found {len(rows)} rows.")
            parts.append(rows.add_column("set", [index] * len(rows), feature=datasets.Value("int64")))
        splits[split] = datasets.concatenate_datasets(parts)
    return Stage(tuple(names), tuple(rated.scale for rated in sets), datasets.DatasetDict(splits))


def check_stage(checkpoint: str | Path, step: int, ends: Sequence[int]) -> None:
    """Raises ValueError if `checkpoint`, of `step`, now belongs to another stage than it was written in.

    `ends`: the step of the run at which each stage ends. The checkpoint knows its stage by the `Best` that its run kept.
    """
    written = read_run_state(checkpoint)["best"]["stage"]
    now = next((number for number, end in enumerate(ends, start=1) if step <= end), len(ends))
    if written != now:
        raise ValueError(
            f"{checkpoint} was written in stage {written} and now belongs to stage {now}, since the stages end at steps "
            f"{', '.join(map(str, ends))}: give the same --stages, --max_train_steps and --num_train_epochs as before."
        )


class ScoreMaps(torch.nn.Module):
    """One learned, increasing line for each set, from a score in (0, 1) to the mean opinion score of that set.

    In units in which the set's scale is [0, 1]: `exp(log_slope) * score + intercept`. It starts as the identity, so
    that scores from 0 to 1 cover the scale, and can then take up how a set's raters used theirs: AIGIQA-20K's mean is
    3.9 of 5, AGIQA-3K's 2.5. The slope stays positive, so that better remains better. Dropped after training: what
    orders images is the score.

    Args:
        number: of sets.
    """

    def __init__(self, number: int):
        super().__init__()
        self.log_slope = torch.nn.Parameter(torch.zeros(number))
        self.intercept = torch.nn.Parameter(torch.zeros(number))

    def forward(self, scores: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
        """Predictions (B,) fp32 of `scores` (B,) of images of `sets` (B,) int64, as parts of each set's scale: compare
        them with (mos - low) / (high - low). About [0, 1], but nothing keeps them inside."""
        return self.log_slope.exp()[sets] * scores.float() + self.intercept[sets]

    def lines(self) -> list[tuple[float, float]]:
        """(slope, intercept) of each set, as numbers to keep and to report; see `to_scale`."""
        return list(zip(self.log_slope.exp().tolist(), self.intercept.tolist()))


def to_scale(scores: torch.Tensor, scale: Scale, line: tuple[float, float] = (1.0, 0.0)) -> torch.Tensor:
    """Predictions (B,) float64 on a set's own `scale` of `scores` (B,) in (0, 1), through the set's `line`, if any."""
    (low, high), (slope, intercept) = scale, line
    return (slope * scores.double() + intercept) * (high - low) + low


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
