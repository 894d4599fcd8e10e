"""Stage 1 of ACPO in several stages of rating sets, each starting from the weights that the last one arrived at.

The paper pre-trains its evaluators in three stages and does not describe them; docs/training-evaluators.md has ours. Here
is what the training scripts of the evaluators share: the `--stages` flag, the rows of a stage, its steps, and the maps
that let sets rated on different scales teach one score.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import datasets
import torch

from acpo_utils.checkpoints import checkpoint_step, read_run_state
from acpo_utils.data import check_images
from acpo_utils.ratings.best import best_folder
from acpo_utils.ratings.images import load_rated_images
from acpo_utils.ratings.robustness import check_originals, rows_to_measure
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
            quality, alignment, std, generator and reference (see `RatingSet`; undecoded).
        number: of the stage in its run, from 1.
        start: steps of the run before the stage's first one. end: the number of its last one. Both by `set_steps`.
    """

    names: tuple[str, ...]
    scales: tuple[Scale, ...]
    splits: datasets.DatasetDict
    number: int = 1
    start: int = 0
    end: int = 0

    def of_set(self, split: str, index: int) -> list[int]:
        """Which rows of `split` belong to set number `index`, in order. With one set: all of them."""
        if len(self.names) == 1:
            return list(range(len(self.splits[split])))
        return [row for row, number in enumerate(self.splits[split]["set"][:]) if number == index]

    def samples(self, step: int, samples_per_step: int) -> range:
        """Which of the samples of the stage are still to come after `step` of the run."""
        return range((step - self.start) * samples_per_step, (self.end - self.start) * samples_per_step)

    def target(self, row: dict, mos_column: str) -> tuple[int, float]:
        """Of a row the number of its set, and its score as a part of that set's scale, in [0, 1]."""
        index = row["set"] if len(self.names) > 1 else 0
        low, high = self.scales[index]
        return index, (row[mos_column] - low) / (high - low)


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
            number=number,
        )
        for number, (stage, target) in enumerate(zip(parsed, targets), start=1)
    ]


def join_sets(
    sets: Sequence[RatingSet],
    names: Sequence[str],
    skip_bad_images: bool = False,
    max_samples: dict[str, int | None] | None = None,
    seed: int = 0,
    number: int = 1,
) -> Stage:
    """Stage `number`, of `sets`; a name that is there already gets a number. The rest as in `read_stages`."""
    names = [name if name not in names[:i] else f"{name}-{i + 1}" for i, name in enumerate(names)]
    splits = {}
    for split in ("train", "validation", "test"):
        parts = []
        for index, (name, rated) in enumerate(zip(names, sets)):
            rows, limit = rated.splits[split], (max_samples or {}).get(split)
            if limit is not None and limit < len(rows):
                rows = rows.shuffle(seed=seed).select(range(limit))
            for column in ("image", "reference"):
                rows = rows.cast_column(column, datasets.Image(decode=False))
            rows = check_images(rows, "image", skip_bad_images)
            if split != "train" and len(set(rows["mos"][:])) < 2:
                raise ValueError(f"{name}, {split}: expected two different scores to rank, found {len(rows)} rows.")
            parts.append(rows.add_column("set", [index] * len(rows), feature=datasets.Value("int64")))
        splits[split] = datasets.concatenate_datasets(parts)
    return Stage(tuple(names), tuple(rated.scale for rated in sets), datasets.DatasetDict(splits), number)


def load_stages(args, max_samples: dict[str, int | None]) -> list[Stage]:
    """The rows of a training script's stages, read and checked before any training.

    Args:
        args: the script's: --stages, or --train_data_dir or --dataset_name, which are one stage.
        max_samples: the most rows in a split, of each rating set; {"train": 100}.
    Raises:
        ValueError: as `read_stages`, `load_rated_images` and `check_originals` do, and for a --group_column or a
            --reference_column that the test rows have not.
    """
    if args.stages:
        stages = read_stages(
            args.stages,
            targets=args.target,
            split_seed=args.split_seed,
            csv_scale=tuple(args.mos_range),
            skip_bad_images=args.skip_bad_images,
            max_samples=max_samples,
        )
    else:
        splits = load_rated_images(
            train_data_dir=args.train_data_dir,
            dataset_name=args.dataset_name,
            dataset_config_name=args.dataset_config_name,
            image_column=args.image_column,
            prompt_column=args.prompt_column,
            mos_column=args.mos_column,
            reference_column=args.reference_column,
            mos_range=args.mos_range,
            skip_bad_images=args.skip_bad_images,
            max_samples=max_samples,
            cache_dir=args.cache_dir,
            seed=args.seed,
        )
        stages = [Stage(names=("ratings",), scales=(tuple(args.mos_range),), splits=splits)]
    for stage in stages:
        columns = stage.splits["test"].column_names
        if args.group_column and args.group_column not in columns:
            raise ValueError(f"--group_column {args.group_column}: expected one of {columns}.")
        if args.reference_column != "reference" and args.reference_column not in columns:
            raise ValueError(f"--reference_column {args.reference_column}: expected one of {columns}.")
        for index in range(len(stage.names)):
            rows = stage.splits["test"].select(stage.of_set("test", index))
            rows = rows_to_measure(rows, args.max_robustness_samples)
            check_originals(rows, args.image_column, args.reference_column)
    return stages


def set_steps(stages: Sequence[Stage], samples_per_step: int, args) -> list[Stage]:
    """`stages`, each with the steps of the run that are its own; fills in --max_train_steps from --num_train_epochs."""
    if not args.max_train_steps:
        steps_per_epoch = [math.ceil(len(stage.splits["train"]) / samples_per_step) for stage in stages]
        args.max_train_steps = [epochs * steps for epochs, steps in zip(args.num_train_epochs, steps_per_epoch)]
    ends = list(accumulate(args.max_train_steps))
    return [replace(stage, start=start, end=end) for stage, start, end in zip(stages, [0, *ends], ends)]


def resumed_step(checkpoint: Path | None, stages: Sequence[Stage], args) -> int:
    """The step that `checkpoint` was written at, 0 without one.

    Args:
        stages: of the run, with their steps. args: a training script's.
    Raises:
        ValueError: if the run is complete, if the checkpoint now belongs to another stage than it was written in (its run
            kept a `Best`, which knows), or if the report of a stage before it is missing.
    """
    if checkpoint is None:
        return 0
    step, ends = checkpoint_step(checkpoint), [stage.end for stage in stages]
    if step > ends[-1] or (step == ends[-1] and Path(args.output_dir, "metrics.json").is_file()):
        raise ValueError(f"{checkpoint} is already at step {step} of --max_train_steps {ends[-1]}.")
    written = read_run_state(checkpoint)["best"]["stage"]
    now = next(number for number, end in enumerate(ends, start=1) if step <= end)
    if written != now:
        raise ValueError(
            f"{checkpoint} was written in stage {written} and now belongs to stage {now}, since the stages end at steps "
            f"{', '.join(map(str, ends))}: give the same --stages, --max_train_steps and --num_train_epochs as before."
        )
    for number in range(1, now):
        if not (report := best_folder(args, number) / "metrics.json").is_file():
            raise ValueError(f"{checkpoint} comes after stage {number}: expected its report {report}, found none.")
    return step


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
