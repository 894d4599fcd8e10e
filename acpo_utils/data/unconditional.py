"""Images without captions, for unconditional models: one column, whatever it is called; item n depends on (seed, n)."""

import datasets
import numpy as np
import torch

from acpo_utils.data.captioned import load_captioned_images
from acpo_utils.data.pictures import fit_image, read_image
from acpo_utils.randomness import EpochOrder


def load_unconditional_images(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    image_column: str | None = None,
    max_train_samples: int | None = None,
    cache_dir: str | None = None,
    seed: int = 0,
    split: str = "train",
) -> datasets.Dataset:
    """Opens a data set of the hub, or a local folder or parquet file, as one column "image" of undecoded cells.

    `image_column` None: "image", or "img" where there is only that. Labels and captions are left out. Otherwise as in
    `acpo_utils.data.captioned.load_captioned_images`, which also says what is raised.
    """
    dataset = load_captioned_images(
        dataset_name=dataset_name,
        dataset_config_name=dataset_config_name,
        train_data_dir=train_data_dir,
        image_column=image_column,
        caption_column=None,
        max_train_samples=max_train_samples,
        cache_dir=cache_dir,
        seed=seed,
        split=split,
    )
    column = image_column or ("image" if "image" in dataset.column_names else "img")
    dataset = dataset.select_columns(column)
    return dataset if column == "image" else dataset.rename_column(column, "image")


class UnconditionalImages(torch.utils.data.Dataset):
    """An endless, reproducible stream over a data set, cut at `num_samples` items.

    Order, crop and flip of item n are drawn from (seed, n) as in `acpo_utils.data.captioned.CaptionedImages`, so that a run is
    resumed by counting. Items are {"pixel_values": (3, R, R) float32 in [-1, 1]}.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        resolution: int,
        num_samples: int,
        seed: int = 0,
        center_crop: bool = False,
        random_flip: bool = False,
    ):
        self.dataset = dataset
        self.resolution = resolution
        self.num_samples = num_samples
        self.seed = seed
        self.center_crop = center_crop
        self.random_flip = random_flip
        self._row = EpochOrder(len(dataset), seed)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        if not 0 <= n < self.num_samples:
            raise IndexError(f"item {n} of {self.num_samples}")
        image = read_image(self.dataset[self._row(n)]["image"])
        rng = np.random.default_rng((self.seed, 1, n))
        return {"pixel_values": fit_image(image, self.resolution, self.center_crop, self.random_flip, rng)}


def hold_out(dataset: datasets.Dataset, number: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """All but the last `number` rows to train on, and those. Raises ValueError if none would be left."""
    if number >= len(dataset):
        raise ValueError(
            f"--num_validation_images {number} of {len(dataset)} images leaves none to train on: hold fewer out, or "
            "name other images by --validation_data_dir."
        )
    rest = len(dataset) - number
    return dataset.select(range(rest)), dataset.select(range(rest, len(dataset)))


def load_validation_images(validation_data_dir: str, number: int, **options) -> datasets.Dataset:
    """The first `number` images of a folder or parquet file; options and errors as in `load_unconditional_images`."""
    try:
        dataset = load_unconditional_images(train_data_dir=validation_data_dir, split="validation", **options)
    except ValueError as error:
        raise ValueError(str(error).replace("--train_data_dir", "--validation_data_dir")) from error
    return dataset.select(range(min(number, len(dataset))))


def to_tensor(dataset: datasets.Dataset, resolution: int) -> torch.Tensor:
    """All images of a small data set, centre-cropped and never mirrored: (N, 3, R, R) float32 in [0, 1]."""
    fixed = {"center_crop": True, "random_flip": False, "rng": np.random.default_rng(0)}
    return torch.stack([fit_image(read_image(row["image"]), resolution, **fixed) for row in dataset]) / 2 + 0.5
