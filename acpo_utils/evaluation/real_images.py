"""Real images that generated ones are measured against: read and checked, then brought to the generated ones' size."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from pyarrow import parquet
from tqdm.auto import tqdm

from acpo_utils.data import check_images, load_captioned_images, read_image
from acpo_utils.files import atomic_write, one_line, parquet_errors


logger = logging.getLogger(__name__)


class RealImages(NamedTuple):
    """Rows of a data set, the name of the column with their images, and n captions, or None."""

    dataset: Dataset
    image_column: str
    captions: list[str] | None


def read_real_images(
    real_data_dir: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    max_real_images: int | None = None,
    seed: int = 0,
    optional_captions: bool = False,
) -> RealImages:
    """The images of a folder or parquet file, every one of them checked, or a choice of them by `seed`.

    Args:
        image_column: by default "image", or "img" where there is only that. caption_column: None for images alone; of
            several captions of an image the first one counts. optional_captions: without that column, or with empty
            cells in it, there are no captions.
    Raises:
        ValueError: as `load_captioned_images` and `check_images` do.
    """

    def load(caption_column: str | None) -> Dataset:
        try:
            return load_captioned_images(
                train_data_dir=real_data_dir,
                image_column=image_column,
                caption_column=caption_column,
                max_train_samples=max_real_images,
                seed=seed,
            )
        except ValueError as error:
            raise ValueError(str(error).replace("--train_data_dir", "--real_data_dir")) from error

    try:
        dataset = load(caption_column)
    except ValueError:
        if not optional_captions:
            raise
        caption_column = None
        dataset = load(None)
    image_column = image_column or ("image" if "image" in dataset.column_names else "img")
    dataset = check_images(dataset, image_column)
    captions = None
    if caption_column is not None:
        captions = [text if isinstance(text, str) else text[0] for text in dataset[caption_column][:]]
    return RealImages(dataset, image_column, captions)


def write_real_images(real: RealImages, size: tuple[int, int], folder: str | Path) -> list[Path]:
    """PNG files of the images at `size` (width, height), the shorter side resized and the centre cut out, in order."""
    files = []
    for number, row in enumerate(tqdm(real.dataset.select_columns(real.image_column), desc="resizing real images")):
        image = read_image(row[real.image_column])
        files.append(Path(folder, f"{number:06d}.png"))
        with atomic_write(files[-1]) as temporary:
            ImageOps.fit(image, size, Image.Resampling.LANCZOS).save(temporary)
    return files


def read_prompt_images(file: str | Path | None, count: int, size: tuple[int, int]) -> dict[int, torch.Tensor]:
    """{row: (3, height, width) in [0, 1]}: the images beside the first `count` prompts of a parquet file, at `size`.

    `size` is (width, height): the shorter side is resized and the centre cut out. Rows without an image, or with one that
    cannot be read, are left out; so are all of a file of another kind, or one without a column `image` or `img`.
    """
    if file is None or Path(file).suffix.lower() != ".parquet":
        return {}
    with parquet_errors(f"Prompt file {file}"):
        table = parquet.ParquetFile(file)
        column = next((name for name in ("image", "img") if name in table.schema_arrow.names), None)
        cells = table.read(columns=[column]).to_pydict()[column][:count] if column else []
    images = {}
    for row, cell in enumerate(cells):
        try:
            image = ImageOps.fit(read_image(cell), size, Image.Resampling.LANCZOS)
        except Exception as error:  # of many kinds, as PIL's decoders raise them; a training has just ended
            logger.warning("%s, row %d: its real image is left out: %s", file, row + 1, one_line(error))
            continue
        images[row] = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return images
