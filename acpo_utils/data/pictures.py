"""Pictures: any PIL image as 8-bit RGB, fitted to a square; every one of a data set decoded once, before training."""

import io
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from acpo_utils.data.image_folder import row_of
from acpo_utils.files import one_line


logger = logging.getLogger(__name__)

LONGEST = 16  # a strip this many times as long as it is wide, or longer, is cropped before it is resized


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB, upright (EXIF), 16 and 32 bits scaled to 8, transparency on white.

    Raises ValueError for 32-bit pixels whose scale their values do not show (see `_from_integers`, `_from_floats`).
    """
    sixteen_bit = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")  # before its format is lost
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # convert("RGB") would clip at 255, to an almost white image
        image = _from_integers(image, sixteen_bit)
    elif image.mode == "F":
        image = _from_floats(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image, sixteen_bit: bool) -> Image.Image:
    """8-bit grey of 16-bit integers, or of 32-bit ones that lie in 0 to 255 or in 0 to 65535; others are refused, and
    those of nothing but 0 and 1, which may be a mask or a black picture."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not sixteen_bit and (low < 0 or high > 65535 or high == 1):
        raise ValueError(_unknown_scale(low, high))
    scale = 257 if sixteen_bit or high > 255 else 1
    return Image.fromarray((values.clip(0, 65535) / scale).round().astype(np.uint8))


def _from_floats(image: Image.Image) -> Image.Image:
    """8-bit grey of floats that lie in 0 to 1 or in 0 to 255, a tenth of that around it, as resizing leaves it, cut off.

    With a mean below 1 the second are hardly that, but the highlights of a scale of 0 to 1: refused, unless they are
    whole numbers.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if -0.1 <= low and high <= 1.1:
        return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
    if -25.5 <= low and high <= 280.5 and (values.mean() > 1.1 or np.array_equal(values, values.round())):
        return image.convert("L")
    raise ValueError(_unknown_scale(low, high))


def _unknown_scale(low: float, high: float) -> str:
    return (
        "expected pixels of 8 or 16 bits, or of 32 bits from 0 to 1, 0 to 255 or (integers) 0 to 65535, found 32 bits from "
        f"{low:g} to {high:g}: save it with 8 bits"
    )


def read_image(cell: dict) -> Image.Image:
    """Decodes one undecoded cell of an image column; raises what PIL raises, and ValueError as `to_rgb` does."""
    with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]) as image:
        return to_rgb(image)


def fit_image(
    image: Image.Image, resolution: int, center_crop: bool, random_flip: bool, rng: np.random.Generator
) -> torch.Tensor:
    """An RGB image as (3, R, R) float32 in [-1, 1]: its shorter side scaled to R, cropped, perhaps mirrored."""
    return fit_and_locate(image, resolution, center_crop, random_flip, rng)[0]


def scaled_size(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """(width, height) of an image of `size` = (width, height) whose shorter side is scaled to `resolution`."""
    scale = resolution / min(size)
    width, height = (max(resolution, round(side * scale)) for side in size)
    return width, height


def fit_and_locate(
    image: Image.Image, resolution: int, center_crop: bool, random_flip: bool, rng: np.random.Generator
) -> tuple[torch.Tensor, tuple[int, int]]:
    """`fit_image`, and (top, left) of its crop in the scaled image, of a mirrored one in the mirrored image."""
    width, height = scaled_size(image.size, resolution)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    if not center_crop:
        left, top = int(rng.integers(width - resolution + 1)), int(rng.integers(height - resolution + 1))
    box = (left, top, left + resolution, top + resolution)
    if max(width, height) >= LONGEST * resolution:
        # The same part of the image, without the rest: enlarged whole, 8000 x 4 pixels take gigabytes. Not for every
        # image, since PIL may then resize the height before the width, and round in between.
        sides = (image.width / width, image.height / height) * 2
        box = [min(edge * side, limit) for edge, side, limit in zip(box, sides, image.size * 2)]
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    else:
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        image = image.crop(box)
    pixels = np.asarray(image)  # (R, R, 3) uint8
    if random_flip and rng.random() < 0.5:
        pixels, left = pixels[:, ::-1], width - resolution - left
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1), (top, left)


def check_images(dataset: datasets.Dataset, image_column: str, skip_bad_images: bool = False) -> datasets.Dataset:
    """Decodes every image once. An unreadable one raises ValueError with its name; `skip_bad_images` drops it."""

    images = dataset.select_columns(image_column)

    def problem(row: int) -> str | None:
        cell = None
        try:
            cell = images[row][image_column]
            read_image(cell)
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            name = one_line((cell or {}).get("path") or f"row {row}")
            return f"{name} ({one_line(error) if cell else 'it has none'})"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = list(tqdm(pool.map(problem, range(len(images))), total=len(images), desc="Checking images"))
    bad = [text for text in problems if text is not None]
    first = ""
    if bad:
        source = dataset.info.description or "the images given"
        path = (images[problems.index(bad[0])][image_column] or {}).get("path")
        row = row_of(source, path) if path and not os.path.lexists(path) else None
        first = f"{bad[0]}, in {row or source}"
    if bad and not skip_bad_images:
        raise ValueError(
            f"{len(bad)} of {len(problems)} images cannot be read, the first: {first}. "
            "Repair or remove them, or pass --skip_bad_images."
        )
    if len(bad) == len(problems):
        raise ValueError(f"None of the {len(problems)} images can be read, the first: {first}.")
    if bad:
        logger.warning("Skipped %d of %d images that cannot be read, the first: %s", len(bad), len(problems), first)
        return dataset.select([row for row, text in enumerate(problems) if text is None])
    return dataset
