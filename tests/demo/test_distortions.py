"""KADID-10k's distortions: the published tables, determinism, growth with the level, and bad input."""

import numpy as np
import pytest


pytest.importorskip("skimage")

from distortions import DISTORTIONS, LEVELS, UNCHANGED, distort
from skimage import data


# Mildest first, where KADID's own order is another one; the rest grow from level 1 to 5.
SIGN_CHANGES = {"mean_shift": [(3, 2, 1), (3, 4, 5)], "contrast_change": [(2, 1), (4, 5)]}


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.ascontiguousarray(data.astronaut()[:192, 100:356])  # (192, 256, 3)


def error(image: np.ndarray, name: str, level: int, seed: int = 0) -> float:
    damaged = distort(image, name, level, np.random.default_rng(seed))
    return float(np.mean((damaged.astype(float) - image) ** 2))


def test_the_published_levels():
    assert len(DISTORTIONS) == 25
    assert LEVELS["gaussian_blur"] == (0.1, 0.5, 1, 2, 5)
    assert LEVELS["lens_blur"] == (1, 2, 4, 6, 8)
    assert LEVELS["motion_blur"] == (1, 2, 4, 6, 10)
    assert LEVELS["color_diffusion"] == LEVELS["color_shift"] == (1, 3, 6, 8, 12)
    assert LEVELS["color_saturation_hsv"] == (0.4, 0.2, 0.1, 0, -0.4)
    assert LEVELS["color_saturation_lab"] == (1, 2, 3, 6, 9)
    assert LEVELS["jpeg2000"] == (16, 32, 45, 120, 170)
    assert LEVELS["jpeg"] == (43, 36, 24, 7, 4)
    assert LEVELS["white_noise"] == LEVELS["denoise"] == (0.001, 0.002, 0.003, 0.005, 0.01)
    assert LEVELS["white_noise_ycbcr"] == (0.0001, 0.0005, 0.001, 0.002, 0.003)
    assert LEVELS["impulse_noise"] == (0.001, 0.005, 0.01, 0.02, 0.03)
    assert LEVELS["multiplicative_noise"] == (0.001, 0.005, 0.01, 0.02, 0.05)
    assert LEVELS["brighten"] == (0.1, 0.2, 0.4, 0.7, 1.1)
    assert LEVELS["darken"] == (0.05, 0.1, 0.2, 0.4, 0.8)
    assert LEVELS["mean_shift"] == (0.15, 0.08, 0, -0.08, -0.15)
    assert LEVELS["jitter"] == (0.05, 0.1, 0.2, 0.5, 1)
    assert LEVELS["non_eccentricity_patch"] == (20, 40, 60, 80, 100)
    assert LEVELS["pixelate"] == (0.01, 0.05, 0.1, 0.2, 0.5)
    assert LEVELS["quantization"] == (20, 16, 13, 10, 7)
    assert LEVELS["color_block"] == (2, 4, 6, 8, 10)
    assert LEVELS["high_sharpen"] == (1, 2, 3, 6, 12)
    assert LEVELS["contrast_change"] == (0.3, 0.15, 0, -0.4, -0.6)


def test_numbers_are_those_of_kadid(photo):
    for number, name in ((1, "gaussian_blur"), (10, "jpeg"), (18, "mean_shift"), (25, "contrast_change")):
        by_number, by_name = (distort(photo, which, 5, np.random.default_rng(0)) for which in (number, name))
        assert np.array_equal(by_number, by_name)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_every_level_changes_the_image_and_the_seed_decides_how(photo, name):
    before = photo.copy()
    for level in range(1, 6):
        first, again = (distort(photo, name, level, np.random.default_rng(level)) for _ in range(2))
        assert first.shape == photo.shape and first.dtype == np.uint8
        assert np.array_equal(first, again)
        change = np.abs(first.astype(int) - photo)
        assert change.max() <= 1 if (name, level) in UNCHANGED else change.max() > 1, (name, level)
    assert np.array_equal(photo, before)


@pytest.mark.parametrize("name", ["white_noise", "impulse_noise", "jitter", "motion_blur", "color_block"])
def test_other_seeds_give_other_images(photo, name):
    first, second = (distort(photo, name, 5, np.random.default_rng(seed)) for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_error_grows_with_the_level(photo, name):
    for levels in SIGN_CHANGES.get(name, [(1, 2, 3, 4, 5)]):
        errors = [np.mean([error(photo, name, level, seed) for seed in range(4)]) for level in levels]
        assert errors == sorted(errors) and errors[-1] > errors[0], errors


def test_noise_has_the_variance_that_it_names():
    grey = np.full((200, 200, 3), 128, np.uint8)
    for name, level, variance in (("white_noise", 4, 0.005), ("multiplicative_noise", 3, 0.01 * (128 / 255) ** 2)):
        assert error(grey, name, level) / 255**2 == pytest.approx(variance, rel=0.03)
    salted = distort(grey, "impulse_noise", 5, np.random.default_rng(0))
    assert (salted != 128).mean() == pytest.approx(0.03, rel=0.1)
    assert set(np.unique(salted)) == {0, 128, 255}


def test_blur_widths_follow_the_scale():
    point = np.zeros((61, 61, 3), np.uint8)
    point[30, 30] = 255
    rows, columns = np.mgrid[:61, :61] - 30
    # A blurred half-plane keeps its mean, so that the widths are read off a step instead of a faint point.
    step = np.where(columns < 0, 0, 255).astype(np.uint8)[..., None].repeat(3, -1)
    for scale in (1.0, 0.5):
        profile = distort(step, "gaussian_blur", 5, np.random.default_rng(0), scale)[30, :, 0] / 255
        spread = np.diff(profile)
        places = np.arange(60) + 0.5 - 30
        centre = (spread * places).sum() / spread.sum()
        assert np.sqrt((spread * (places - centre) ** 2).sum() / spread.sum()) == pytest.approx(5 * scale, rel=0.05)
    disk = distort(point, "lens_blur", 5, np.random.default_rng(0), 1.0)[..., 0] > 0
    assert np.hypot(rows, columns)[disk].max() == pytest.approx(8, abs=0.75)


def test_curves_go_through_their_points():
    levels = np.array([0, 128, 255], np.uint8).repeat(3).reshape(1, 3, 3)
    darker = distort(levels, "darken", 4, np.random.default_rng(0))[0, :, 0]
    assert darker.tolist() == [0, pytest.approx(255 * 0.3, abs=2), 255]
    shifted = distort(levels, "mean_shift", 1, np.random.default_rng(0))[0, :, 0]
    assert shifted.tolist() == [38, 166, 255]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((8, 8, 3), np.float32)}, "float32"),
        ({"image": np.zeros((8, 8), np.uint8)}, r"\(8, 8\)"),
        ({"distortion": "blurr"}, "blurr"),
        ({"distortion": 0}, "0"),
        ({"distortion": 26}, "26"),
        ({"level": 6}, "6"),
        ({"level": 0}, "0"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_bad_input_is_named(photo, change, message):
    arguments = {"image": photo, "distortion": 1, "level": 1, "rng": np.random.default_rng(0)} | change
    with pytest.raises(ValueError, match=message):
        distort(**arguments)
