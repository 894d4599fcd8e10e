"""Pictures of every depth and every shape: their grey is right or they are named, and none takes gigabytes."""

import io
import subprocess
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from acpo_utils.data import check_images, fit_image, read_image, to_rgb
from acpo_utils.evaluation.set_metrics import read_images


SHAPE = (6, 8)
RAMP = np.arange(48).reshape(SHAPE)  # 0 to 47


def read(array: np.ndarray, kind: str = "TIFF") -> np.ndarray:
    """What `read_image` makes of the file that PIL writes of `array`."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    pixels = np.asarray(read_image({"bytes": buffer.getvalue(), "path": None}))
    assert pixels.shape == (*SHAPE, 3) and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize(
    "array, expected",
    [
        (RAMP.astype(np.int32) * 5, RAMP * 5),
        (RAMP.astype(np.int32) * 1285, RAMP * 5),
        (RAMP.astype(np.uint16) * 1285, RAMP * 5),
        (RAMP.astype(np.uint16), np.round(RAMP / 257)),  # 16 bits are never guessed at
        (np.zeros(SHAPE, np.int32), np.zeros(SHAPE)),
        ((RAMP / 47).astype(np.float32), np.round(RAMP / 47 * 255)),
        ((RAMP / 47 * 1.02 - 0.01).astype(np.float32), np.round((RAMP / 47 * 1.02 - 0.01).clip(0, 1) * 255)),
        ((RAMP % 2).astype(np.float32), RAMP % 2 * 255),
        (RAMP.astype(np.float32) * 5, RAMP * 5),
        (RAMP.astype(np.float32) * 5 + 0.25, RAMP * 5),
        ((RAMP == 7).astype(np.float32) * 9, (RAMP == 7) * 9),  # almost black, but of whole numbers
        (np.zeros(SHAPE, np.float32), np.zeros(SHAPE)),
    ],
)
def test_the_grey_of_a_tiff_of_16_and_32_bits(array, expected):
    np.testing.assert_array_equal(read(array), expected)


def test_a_dark_pgm_of_16_bits_stays_dark():
    """Its mode is that of 32 bits in PIL."""
    content = b"P5 8 6 65535\n" + RAMP.astype(">u2").tobytes()
    image = Image.open(io.BytesIO(content))
    assert image.mode == "I" and np.asarray(to_rgb(image)).max() == 0
    content = b"P5 8 6 65535\n" + (RAMP * 1285).astype(">u2").tobytes()
    assert np.array_equal(np.asarray(to_rgb(Image.open(io.BytesIO(content))))[..., 0], RAMP * 5)


UNKNOWN = {
    "negative": RAMP.astype(np.int32) - 1,
    "more than 16 bits": RAMP.astype(np.int32) * 10_000,
    "0 and 1": (RAMP % 2).astype(np.int32),
    "-1 to 1": (RAMP / 23.5 - 1).astype(np.float32),
    "highlights": (RAMP**4 / 47**4 * 3).astype(np.float32),
    "0 to 65535": (RAMP * 1285).astype(np.float32),
    "nan": np.where(RAMP == 3, np.nan, RAMP / 47).astype(np.float32),
    "infinite": np.where(RAMP == 3, np.inf, RAMP / 47).astype(np.float32),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_scale_that_cannot_be_known_is_named(tmp_path, case, recwarn):
    for number in range(3):
        Image.new("L", (8, 6)).save(tmp_path / f"{number}.tif")
    Image.fromarray(UNKNOWN[case]).save(tmp_path / "2.tif")
    cells = [{"bytes": None, "path": str(tmp_path / f"{number}.tif")} for number in range(3)]
    rows = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image(decode=False))
    with pytest.raises(
        ValueError, match=r"1 of 3 images .* the first: .*2\.tif \(expected pixels of .* found 32 bits"
    ):
        check_images(rows, "image")
    assert len(check_images(rows, "image", skip_bad_images=True)) == 2
    with pytest.raises(ValueError, match=r"2\.tif cannot be read: expected pixels"):
        list(read_images([tmp_path / f"{number}.tif" for number in range(3)]))
    assert not recwarn.list


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def whole_first(image, resolution, center_crop, rng):
    """Resize, then crop: what an ordinary picture becomes."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    if not center_crop:
        left, top = int(rng.integers(width - resolution + 1)), int(rng.integers(height - resolution + 1))
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (40, 30), (31, 47), (500, 33), (20, 300), (7, 100)])
def test_an_ordinary_picture_is_resized_whole(size, center_crop):
    image = picture(*size)
    for seed in range(5):
        found = fit_image(image, 16, center_crop, False, np.random.default_rng(seed)).numpy()
        expected = whole_first(image, 16, center_crop, np.random.default_rng(seed))
        assert np.array_equal(found, expected.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("size", [(1600, 4), (3, 900), (2000, 40), (30, 1999), (1, 600), (256, 16)])
def test_a_long_strip_is_the_same_part_of_the_picture(size, center_crop):
    rows, columns = np.indices(size[::-1])
    channels = [np.sin(columns / 7) + np.cos(rows / 5), np.cos(columns / 50 + rows / 40), np.sin(columns / 11 - rows)]
    image = Image.fromarray((np.stack(channels, -1) * 60 + 128).astype(np.uint8))
    for seed in range(5):
        found = fit_image(image, 16, center_crop, False, np.random.default_rng(seed)).numpy()
        expected = whole_first(image, 16, center_crop, np.random.default_rng(seed))
        levels = (found + 1) * 127.5 - expected.transpose(2, 0, 1)
        assert found.shape == (3, 16, 16) and np.abs(levels).max() < 2.5, "but for rounding"


MEMORY = """
import resource
import numpy as np
from PIL import Image
from acpo_utils.data import fit_image
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB
rng = np.random.default_rng(0)
fit_image(Image.new("RGB", (600, 400)), 512, False, True, rng)
before = peak()
for size in [(8000, 4), (4, 8000), (60000, 1)]:
    fit_image(Image.new("RGB", size), 512, False, True, rng)
    fit_image(Image.new("RGB", size), 512, True, False, None)
print(peak() - before)
"""


def test_a_picture_of_8000_x_4_pixels_takes_little_memory():
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 50, "megabytes; it took 2,000"
