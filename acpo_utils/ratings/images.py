"""Rated images in the common form: folders or parquet files of (image, prompt, score), one for each split."""

import random
from collections.abc import Sequence
from pathlib import Path

import datasets

from acpo_utils.data import check_images, load_captioned_images
from acpo_utils.data.local_data import parquet_files


def load_rated_images(
    train_data_dir: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    image_column: str = "image",
    prompt_column: str | None = "prompt",
    mos_column: str = "mos",
    reference_column: str = "reference",
    mos_range: Sequence[float] = (0.0, 5.0),
    skip_bad_images: bool = False,
    max_samples: dict[str, int | None] | None = None,
    cache_dir: str | None = None,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Train, validation and test rows of a data set of the hub (`dataset_name`) or of a local folder
    (`train_data_dir`: a folder for each split or parquet files named after them, as `load_captioned_images` opens).

    A split that is missing takes a tenth of the training prompts, with all their rows, so that no prompt stands on both
    sides; without prompts (`prompt_column` None) a tenth of the rows. `seed` chooses which. `mos_range`: lowest and
    highest score. `max_samples`: the most rows of a split, {"train": 100}. The image column comes undecoded, as rows of
    {"bytes", "path"}; so does `reference_column`, the images' originals, where there is one.

    Raises ValueError, in one line, for what `load_captioned_images` and `check_images` refuse, originals that are no images,
    a score that is not in `mos_range`, too few prompts to split, and a validation or test split with fewer than two different scores.
    """
    splits, data = {}, dataset_name or train_data_dir
    for split in ("train", "validation", "test"):
        source = {"dataset_name": dataset_name, "train_data_dir": train_data_dir}
        name = _find_split(source, split, dataset_config_name)
        if name is None:
            continue
        rows = load_captioned_images(
            **source,
            dataset_config_name=dataset_config_name,
            image_column=image_column,
            caption_column=prompt_column,
            max_train_samples=(max_samples or {}).get(split),
            cache_dir=cache_dir,
            seed=seed,
            split=name,
        )
        if prompt_column is not None and isinstance(rows.features[prompt_column], datasets.List):
            raise ValueError(f"--prompt_column {prompt_column} of {data}: expected one text per image, found lists.")
        _check_scores(rows, data, split, mos_column, mos_range)
        rows = _undecoded_originals(rows, data, split, reference_column)
        splits[split] = check_images(rows, image_column, skip_bad_images)

    if prompt_column is None:
        unit, keys = "rows", list(range(len(splits["train"])))
    else:
        unit, keys = "prompts", splits["train"][prompt_column][:]
    prompts = sorted(set(keys))
    random.Random(seed).shuffle(prompts)
    for split in [split for split in ("train", "validation", "test") if split not in splits]:
        count = max(1, len(prompts) // 10)
        chosen, prompts = set(prompts[:count]), prompts[count:]
        if not prompts:
            raise ValueError(f"{data}: too few {unit} to split off {split}: expected at least 3, or files of its own.")
        inside = [key in chosen for key in keys]
        splits[split] = splits["train"].select([i for i, yes in enumerate(inside) if yes])
        splits["train"] = splits["train"].select([i for i, yes in enumerate(inside) if not yes])
        keys = [key for key, yes in zip(keys, inside) if not yes]
    for split in ("validation", "test"):
        if len(set(splits[split][mos_column][:])) < 2:
            raise ValueError(
                f"{data}, {split}: expected at least two different scores to rank, found {len(splits[split])} rows."
            )
    return datasets.DatasetDict({split: splits[split] for split in ("train", "validation", "test")})


def _find_split(source: dict, split: str, dataset_config_name: str | None) -> str | None:
    """The name under which `load_captioned_images` opens `split`, None if there is none; the training split is
    whatever there is. A split with a folder of its own: `source` then points there, and the name is "train"."""
    if source["train_data_dir"]:
        folder = Path(source["train_data_dir"])
        if (folder / split).is_dir():
            source["train_data_dir"] = str(folder / split)
            return "train"
        stems = [file.stem for file in parquet_files(folder)]
        found = any(stem == split or stem.startswith(f"{split}-") for stem in stems)
    elif split != "train":
        found = split in datasets.get_dataset_split_names(source["dataset_name"], dataset_config_name)
    return split if split == "train" or found else None


def _undecoded_originals(rows: datasets.Dataset, data: str, split: str, reference_column: str) -> datasets.Dataset:
    if reference_column not in rows.column_names:
        return rows
    feature = rows.features[reference_column]
    if not isinstance(feature, datasets.Image) and not (
        isinstance(feature, dict) and {"bytes", "path"} == set(feature)
    ):
        raise ValueError(
            f"--reference_column {reference_column} of {data}: expected images, or reference_file_name in the metadata of a "
            f"folder, found {getattr(feature, 'dtype', type(feature).__name__)} ({split})."
        )
    description = rows.info.description
    rows = rows.cast_column(reference_column, datasets.Image(decode=False))
    rows.info.description = description  # for the messages of check_images()
    return rows


def _check_scores(rows: datasets.Dataset, data: str, split: str, mos_column: str, mos_range: Sequence[float]) -> None:
    if mos_column not in rows.column_names:
        raise ValueError(f"--mos_column {mos_column}: expected one of {rows.column_names} ({split} of {data}).")
    kind = str(getattr(rows.features[mos_column], "dtype", type(rows.features[mos_column]).__name__))
    if not kind.startswith(("int", "uint", "float")):
        raise ValueError(f"--mos_column {mos_column} of {data}: expected numbers, found {kind} ({split}).")
    low, high = mos_range
    for number, mos in enumerate(rows[mos_column][:]):
        if mos is None or not low <= mos <= high:
            raise ValueError(
                f"--mos_column {mos_column} of {data}, row {number} of {split}: expected a number from {low:g} to {high:g} "
                f"(--mos_range), found {mos!r}."
            )
