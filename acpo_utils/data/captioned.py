"""Captioned images: everything is checked before training, and item n depends on (seed, n) alone."""

import glob
import logging
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch

from acpo_utils.data.image_folder import row_of
from acpo_utils.data.local_data import open_local, reason
from acpo_utils.data.pictures import fit_and_locate, read_image
from acpo_utils.randomness import EpochOrder


logger = logging.getLogger(__name__)


def load_captioned_images(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    image_column: str | None = "image",
    caption_column: str | None = "text",
    max_train_samples: int | None = None,
    cache_dir: str | None = None,
    seed: int = 0,
    split: str = "train",
) -> datasets.Dataset:
    """Opens a data set of the hub (`dataset_name`), or a local folder or file (`train_data_dir`).

    A folder holds images with a metadata.jsonl, .csv or .parquet (`file_name` and the caption column) or with a .txt
    beside each; or parquet files named after their split (`train.parquet`, `train-*.parquet`, `data/train-*.parquet`);
    or what `save_to_disk` wrote. A file is a parquet file, or that metadata. `max_train_samples` takes a random subset
    chosen by `seed`. `image_column` None: "image", or "img" if there is only that (CIFAR-10). `caption_column` None:
    images alone will do. The image column comes undecoded, as rows of {"bytes", "path"}, so that a file that cannot be
    read can be named (`check_images`).

    Raises ValueError, in one line, for an unknown path or column, an empty data set, a column that holds no images
    or no captions, and if not exactly one source is given.
    """
    if (dataset_name is None) == (train_data_dir is None):
        found = "neither" if dataset_name is None else "both"
        raise ValueError(f"Expected one of --dataset_name and --train_data_dir, found {found}: give exactly one.")
    source = dataset_name or train_data_dir
    if train_data_dir is not None:
        dataset = open_local(
            Path(train_data_dir),
            split=split,
            image_column=image_column,
            caption_column=caption_column,
            cache_dir=cache_dir,
        )
    else:
        if Path(dataset_name).is_dir() and glob.has_magic(os.path.abspath(dataset_name)):
            raise ValueError(
                f"--dataset_name {dataset_name}: give a folder with [, * or ? in its path as --train_data_dir."
            )
        try:
            dataset = datasets.load_dataset(dataset_name, name=dataset_config_name, split=split, cache_dir=cache_dir)
        except Exception as error:  # datasets raises a dozen unrelated types here; the reader needs the sentence
            raise ValueError(f"Data set {dataset_name} ({split}) cannot be loaded: {reason(error)}") from error

    if image_column is None:
        image_column = "img" if "img" in dataset.column_names and "image" not in dataset.column_names else "image"
    for flag, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column is not None and column not in dataset.column_names:
            found = ", ".join(dataset.column_names)
            hint = ""
            if found == "image" and train_data_dir is not None:
                hint = (
                    " Captions are read from a metadata.jsonl, .csv or .parquet, or from a .txt beside each picture."
                )
            raise ValueError(f"{flag} {column}: data set {source} has no such column, it has: {found}.{hint}")
    feature = dataset.features[image_column]
    if not isinstance(feature, datasets.Image) and not (
        isinstance(feature, dict) and {"bytes", "path"} == set(feature)
    ):
        raise ValueError(f"--image_column {image_column} of {source}: expected images, found {_kind(feature)}.")
    if caption_column is not None:
        _check_captions(dataset, image_column, caption_column, source)

    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    dataset.info.description = str(source)  # for the messages of check_images()
    if max_train_samples is not None and max_train_samples < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(max_train_samples))
    return dataset


def _check_captions(dataset: datasets.Dataset, image_column: str, caption_column: str, source: str) -> None:
    feature = dataset.features[caption_column]
    feature = feature.feature if isinstance(feature, datasets.List) else feature  # several captions for one image
    if _kind(feature) not in ("string", "large_string"):
        raise ValueError(f"--caption_column {caption_column} of {source}: expected text, found {_kind(feature)}.")
    try:
        captions = dataset[caption_column][:]
    except UnicodeDecodeError as error:  # parquet files are read without a look at their text
        raise ValueError(f"--caption_column {caption_column} of {source}: expected UTF-8, {error.reason}.") from error
    empty = [text is None or isinstance(text, list) and (not text or None in text) for text in captions]
    if any(empty):
        number = empty.index(True)
        cell = dataset.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))[number]
        first = row_of(source, (cell[image_column] or {}).get("path")) or f"row {number + 1}"
        words = "" if os.path.exists(source) else " (None, NA, null and nan in a csv of the hub count as empty)"
        raise ValueError(
            f"--caption_column {caption_column} of {source}: {sum(empty)} of {len(dataset)} rows are empty, the first: "
            f"{first}{words}."
        )


def _kind(feature) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


class CaptionedImages(torch.utils.data.Dataset):
    """An endless, reproducible stream over a data set, cut at `num_samples` items.

    Item n belongs to epoch n // size, which has its own permutation drawn from (seed, epoch); crop, flip and choice
    of caption are drawn from (seed, n). So the data position of a run is one number: to resume after k items, go on
    with item k. Items are {"pixel_values": (3, R, R) float32 in [-1, 1], "input_ids": (L,) int64 if there is a
    tokenizer (of a list of them `token_ids`), "prompt": str}, and what `describe_crop` says.

    Args:
        describe_crop: (original size, top left of the crop, (R, R)) -> {name: tensor}, heights before widths, what a model
            is told of each picture, as SDXL is (`acpo_utils.families.sdxl.time_ids`).
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        tokenizer,
        resolution: int,
        num_samples: int,
        seed: int = 0,
        center_crop: bool = False,
        random_flip: bool = False,
        image_column: str = "image",
        caption_column: str = "text",
        describe_crop: Callable[..., dict[str, torch.Tensor]] | None = None,
    ):
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.describe_crop = describe_crop
        self.resolution = resolution
        self.num_samples = num_samples
        self.seed = seed
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.image_column = image_column
        self.caption_column = caption_column
        self._row = EpochOrder(len(dataset), seed)
        if tokenizer is not None:
            self._warn_about_long_captions()

    def _warn_about_long_captions(self) -> None:
        # Here and not in __getitem__, so that it is said once and before training, however many workers there are.
        # The one that reads furthest: what it leaves out no text encoder is told.
        tokenizer = max(_as_list(self.tokenizer), key=lambda tokenizer: tokenizer.model_max_length)
        limit = tokenizer.model_max_length
        captions = []
        for caption in self.dataset[self.caption_column][:]:
            captions += [caption] if isinstance(caption, str) else caption
        # A token is at least one byte, beside those around every caption: most captions need no look.
        around = len(tokenizer("").input_ids)
        suspects = [caption for caption in captions if len(caption.encode()) > limit - around]
        lengths = [len(tokenizer(caption, truncation=False, verbose=False).input_ids) for caption in suspects]
        long = [caption for caption, length in zip(suspects, lengths) if length > limit]
        if long:
            logger.warning(
                "%d of %d captions are longer than the tokenizer's limit of %d tokens and are truncated, the first: %s",
                len(long), len(captions), limit, long[0],
            )  # fmt: skip

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, n: int) -> dict:
        if not 0 <= n < self.num_samples:
            raise IndexError(f"item {n} of {self.num_samples}")
        row = self.dataset[self._row(n)]
        rng = np.random.default_rng((self.seed, 1, n))
        image = read_image(row[self.image_column])
        pixel_values, top_left = fit_and_locate(  # (3, R, R)
            image, self.resolution, self.center_crop, self.random_flip, rng
        )
        caption = row[self.caption_column]
        if not isinstance(caption, str):
            caption = caption[int(rng.integers(len(caption)))]
        item = {"pixel_values": pixel_values, "prompt": caption}
        if self.tokenizer is not None:
            item |= {name: ids[0] for name, ids in token_ids(self.tokenizer, [caption]).items()}  # (L,)
        if self.describe_crop is not None:
            item |= self.describe_crop((image.height, image.width), top_left, (self.resolution, self.resolution))
        return item


def _as_list(tokenizer) -> list:
    return tokenizer if isinstance(tokenizer, list) else [tokenizer]


def token_ids(tokenizer, prompts: list[str]) -> dict[str, torch.Tensor]:
    """{"input_ids": (B, L)} of one tokenizer; of a list of them "input_ids_2" and so on as well."""
    names = ("input_ids", "input_ids_2", "input_ids_3")
    return {name: tokenize(one, prompts) for name, one in zip(names, _as_list(tokenizer))}


def tokenize(tokenizer, prompts: list[str]) -> torch.Tensor:
    """`input_ids` (B, L), padded and truncated to the tokenizer's limit L."""
    length = tokenizer.model_max_length
    return tokenizer(prompts, max_length=length, padding="max_length", truncation=True, return_tensors="pt").input_ids


def collate(items: list[dict]) -> dict:
    """{"pixel_values": (B, 3, R, R), "prompts": list of B strings}, and what else the items have, stacked.

    Of unequal shapes, as the embeddings of Z-Image's captions, they stay a list of B tensors.
    """
    batch = {}
    for name in (name for name in items[0] if name != "prompt"):
        values = [item[name] for item in items]
        batch[name] = torch.stack(values) if len({value.shape for value in values}) == 1 else values
    return {**batch, "prompts": [item["prompt"] for item in items]}


def to_device(batch: dict, device: str | torch.device) -> dict:
    """The batch with its tensors, and those of its lists, on `device`; prompts stay as they are."""

    def move(value):
        if isinstance(value, list):
            return [move(one) for one in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in batch.items()}
