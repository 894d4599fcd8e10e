"""Images rated by people, for stage 1: four published sets in the folders they are downloaded as, and a plain csv.

AGIQA-1K (Zhang et al. 2023), AGIQA-3K (Li et al. 2023), AIGCIQA2023 (Wang et al. 2023) and AIGIQA-20K (Li et al.
2024; its download is called AIGCQA-30K-Image). A score table may be the published .xlsx or the same sheet saved as
.csv; where both are there, the .csv is read. docs/datasets.md has the folders and where to get them.
"""

import logging
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets

from acpo_utils.files import one_line
from acpo_utils.ratings.tables import (
    Row,
    Scale,
    find_file,
    find_images,
    read_cells,
    read_numbers,
    read_table,
    require_file,
)


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
TARGETS = ("quality", "alignment", "authenticity", "correspondence")
FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in ("image", "prompt", "generator", "reference")}
    | {name: datasets.Value("float64") for name in ("mos", "quality", "alignment", "std")}
)


@dataclass(frozen=True)
class RatingSet:
    """A rating set, checked and split.

    `splits` has train, validation and test. Their columns: image (path of a file that exists; cast it to
    `datasets.Image`), prompt, mos (the score of `target`), quality and alignment (None where the set has no such
    score), std (of mos over the raters, None where not published), generator (None where not known), reference (path of
    the image's original, None where not known).
    `scale` is the lowest and highest score the set's scale allows. `drawn` names the splits that were taken out of
    train by prompt, because the publisher has none: () means the official split.
    """

    name: str
    target: str
    scale: Scale
    splits: datasets.DatasetDict
    drawn: tuple[str, ...]


@dataclass(frozen=True)
class Format:
    """How a set is read: its name, `read(path, scale)` to rows by split, the scores it has, its scale if it has one."""

    name: str
    read: Callable[[Path, Scale], dict[str, list[Row]]]
    targets: tuple[str, ...]
    scale: Scale | None


def read_rating_set(
    name: str, path: str | Path, *, target: str = "quality", split_seed: int = 0, scale: Scale | None = None
) -> RatingSet:
    """Reads agiqa-1k, agiqa-3k, aigciqa2023 or aigiqa-20k (also aigcqa-30k-image) from its folder, or a csv file.

    A csv has a header with image (path, relative to the csv), prompt and mos, and may have std, generator and reference; its
    `scale` (lowest, highest) must be given, and `target` says what its one score rates. The published sets have their
    scale. `target` is quality, alignment, authenticity or correspondence, whichever the set has; alignment and
    correspondence are two names of one thing, how well an image fits its prompt (AGIQA-3K says alignment, AIGCIQA2023
    correspondence), and either will do. The one score of AGIQA-1K and of AIGIQA-20K counts as quality, though it also
    weighs the prompt.

    A split that the publisher does not give (all but AIGIQA-20K's) takes a tenth of the prompts with all their images,
    chosen by `split_seed`, so that no prompt stands on both sides.

    Raises ValueError, in one line: for an unknown set or target, and naming file and row for a file, column or image
    that is missing, a score outside the scale, and an image listed twice.
    """
    if name.lower() not in SETS:
        raise ValueError(f"Rating set {name}: expected one of {', '.join(SETS)}.")
    form = SETS[name.lower()]
    synonyms = {"alignment": "correspondence", "correspondence": "alignment"}
    if target not in form.targets and synonyms.get(target) not in form.targets:
        raise ValueError(f"{form.name} has no score for {target}: expected {' or '.join(form.targets)}.")
    if (scale is None) == (form.scale is None):
        expected = "its lowest and highest score" if form.scale is None else f"none, its scale is {form.scale}"
        raise ValueError(f"{form.name}, scale: expected {expected}, found {scale}.")
    scale = form.scale or (float(scale[0]), float(scale[1]))
    if not scale[0] < scale[1]:
        raise ValueError(f"{form.name}, scale: expected the lowest score before the highest, found {scale}.")
    path, kind = Path(path), "file" if form.read is _read_csv else "folder"
    if not (path.is_file() if kind == "file" else path.is_dir()):
        raise ValueError(f"{form.name}: expected a {kind} at {path}, found none.")

    published = form.read(path, scale)
    drawn = tuple(split for split in SPLITS if split not in published)
    splits = published | _draw_splits(path, published["train"], drawn, split_seed)
    column = target if target in form.targets else synonyms[target]
    return RatingSet(
        name=form.name,
        target=target,
        scale=scale,
        splits=datasets.DatasetDict({split: _to_dataset(splits[split], column) for split in SPLITS}),
        drawn=drawn,
    )


def _read_agiqa_1k(root: Path, scale: Scale) -> dict[str, list[Row]]:
    # AIGC_all.csv beside it is another label, on another scale.
    file = require_file(root, "AIGC_MOS_Zscore.csv", "AIGC_MOS_Zscore.xlsx")
    rows = read_table(file, {"image": "image", "prompt": "prompt", "mos": "mos"}, scale)
    # The published sheet has this image twice, with scores 0.44 and 2.08 and the same prompt: nobody can tell which.
    twice = [row for row in rows if row["image"] == "dreamStudio_8_9_1_1.jpg"]
    if len(twice) > 1:
        logger.warning("%s has %s twice, with two scores: left out.", file, twice[0]["image"])
        rows = [row for row in rows if row not in twice]
    rows = [row | {"generator": row["image"].split("_")[0]} for row in rows]
    return {"train": find_images(file, rows, root, "file/{image}", "images/{image}", "{image}")}


def _read_agiqa_3k(root: Path, scale: Scale) -> dict[str, list[Row]]:
    file = require_file(root, "data.csv")
    scores = {"mos_quality": "quality", "std_quality": "std_quality"}
    scores |= {"mos_align": "alignment", "std_align": "std_alignment"}
    rows = read_table(file, {"name": "image", "prompt": "prompt"} | scores, scale)
    rows = [row | {"generator": row["image"].rsplit("_", 1)[0]} for row in rows]  # with its setting: sd1.5_lowstep
    folders = ("{image}", "AGIQA-3K/{image}", "image/{image}", "images/{image}")
    return {"train": find_images(file, rows, root, *folders)}


def _read_aigciqa2023(root: Path, scale: Scale) -> dict[str, list[Row]]:
    """The files of scores name no image: their order is 6 generators, in each 100 prompts, of each 4 images."""
    file = require_file(root, "AIGCIQA2023_Prompts.csv", "AIGCIQA2023_Prompts.xlsx")
    prompts = read_table(file, {"prompt": "prompt"}, scale, headerless=("style", "object", "prompt"))
    if len(prompts) != 100:
        raise ValueError(f"{file}: expected 100 prompts, found {len(prompts)}.")
    generators = ("Controlnet", "DALLE", "Glide", "Lafite", "stable-diffusion", "Unidiffuser")
    rows = []
    for number in range(2400):
        generator, scene, take = generators[number // 400], number % 400 // 4, number % 4 + 1
        rows.append({"row": number + 1, "number": number, "generator": generator, "scene": scene, "take": take})
        rows[-1]["prompt"] = prompts[scene]["prompt"]
    for number, aspect in enumerate(("quality", "authenticity", "correspondence"), start=1):
        file = require_file(root, f"DATA/MOS/mosz{number}.mat", f"moz{number}.txt")
        columns = {aspect: read_numbers(file, "MOSz", len(rows), scale)}
        if spread := find_file(root, f"DATA/STD/SD{number}.mat"):
            columns[f"std_{aspect}"] = read_numbers(spread, "SD", len(rows), (0.0, math.inf))
        for column, values in columns.items():
            rows = [row | {column: value} for row, value in zip(rows, values)]
    names = ("Image/allimg/{number}.png", "allimg/{number}.png", "Image/{generator}/{scene:03d}-{take}.png")
    return {"train": find_images(file, rows, root, *names)}


def _read_aigiqa_20k(root: Path, scale: Scale) -> dict[str, list[Row]]:
    """The official splits as far as they are rated: the challenge published validation and test without scores.

    Their scores are then looked up in data.csv (all 20,000 images), if it is there.
    """
    rated = {"name": "image", "prompt": "prompt", "mos": "mos"}
    unrated = {"name": "image", "prompt": "prompt"}
    complete, splits = find_file(root, "data.csv"), {}
    for split, folder in zip(SPLITS, ("train", "val", "test")):
        names = f"info_{folder}.csv", f"info_{folder}.xlsx"
        file = require_file(root, *names) if split == "train" else find_file(root, *names)
        cells = read_cells(file) if file else None
        has_scores = cells and sum(cell is not None for cell in cells[0][1]) > 2
        if has_scores or split == "train":
            rows = read_table(file, rated, scale, headerless=tuple(rated), cells=cells)
        elif file and complete:
            scores = {row["image"]: row["mos"] for row in read_table(complete, rated, scale)}
            rows = read_table(file, unrated, scale, headerless=tuple(unrated), cells=cells)
            for row in rows:
                if row["image"] not in scores:
                    name = one_line(row["image"])
                    raise ValueError(f"{file}, row {row['row']}: expected a score of {name} in {complete}.")
            rows = [row | {"mos": scores[row["image"]]} for row in rows]
        else:
            found = f"{file} has no scores" if file else f"there is no {' or '.join(names)}"
            logger.warning("%s: %s, so the %s split is taken out of train.", root, found, split)
            continue
        rows = [row | {"generator": row["image"].rsplit("_", 1)[0]} for row in rows]
        splits[split] = find_images(file, rows, root, folder + "/{image}", "images/{image}")
    return splits


def _read_csv(file: Path, scale: Scale) -> dict[str, list[Row]]:
    columns = {"image": "image", "prompt": "prompt", "mos": "mos"}
    rows = read_table(file, columns, scale, optional=("std", "generator", "reference"))
    for row in rows:
        if "reference" in row:
            original = file.parent / row["reference"]
            if not os.path.isfile(original):
                raise ValueError(f"{file}, row {row['row']}: expected reference {one_line(original)}, found none.")
            row["reference"] = str(original)
    return {"train": find_images(file, rows, file.parent, "{image}")}


SETS = {
    "agiqa-1k": Format("agiqa-1k", _read_agiqa_1k, ("quality",), (0.0, 5.0)),
    "agiqa-3k": Format("agiqa-3k", _read_agiqa_3k, ("quality", "alignment"), (0.0, 5.0)),
    "aigciqa2023": Format(
        "aigciqa2023", _read_aigciqa2023, ("quality", "authenticity", "correspondence"), (0.0, 100.0)
    ),
    "aigiqa-20k": Format("aigiqa-20k", _read_aigiqa_20k, ("quality",), (0.0, 5.0)),
    "csv": Format("csv", _read_csv, TARGETS, None),
}
SETS["aigcqa-30k-image"] = SETS["aigiqa-20k"]  # the name of its download


def _draw_splits(source: Path, rows: list[Row], splits: tuple[str, ...], seed: int) -> dict[str, list[Row]]:
    """`rows` in `splits` and "train": each of `splits` gets a tenth of the prompts, and all images of each of them."""
    keys = [" ".join(row["prompt"].casefold().split()) for row in rows]  # "A  cat" is no new prompt after "a cat"
    prompts = sorted(set(keys))
    random.Random(seed).shuffle(prompts)
    tenth = max(1, round(len(prompts) / 10))
    if len(prompts) <= tenth * len(splits):
        raise ValueError(f"{source}: expected more than {len(splits)} prompts to split, found {len(prompts)}.")
    split_of = {prompt: split for i, split in enumerate(splits) for prompt in prompts[i * tenth : (i + 1) * tenth]}
    drawn = {split: [] for split in ("train", *splits)}
    for key, row in zip(keys, rows):
        drawn[split_of.get(key, "train")].append(row)
    return drawn


def _to_dataset(rows: list[Row], target: str) -> datasets.Dataset:
    """`target`: the score's name in the rows; a set with one score has it as `mos`."""
    columns = {name: [] for name in FEATURES}
    for row in rows:
        if "mos" in row:
            row = row | {target: row["mos"], f"std_{target}": row.get("std")}
        renamed = {"mos": row[target], "std": row.get(f"std_{target}")}
        renamed["alignment"] = row.get("alignment", row.get("correspondence"))
        for name, values in columns.items():
            values.append(renamed[name] if name in renamed else row.get(name))
    return datasets.Dataset.from_dict(columns, features=FEATURES)
