"""SWD by scale: equal sets, each kind of change in its own band, and a slow reference in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from acpo_utils.evaluation.sliced_wasserstein import SlicedWasserstein, band_patches, laplacian_pyramid
from acpo_utils.statistics import bootstrap_weights


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """(24, 3, 64, 64): soft blobs with fine grain."""
    generator = torch.Generator().manual_seed(0)
    soft = F.interpolate(torch.rand(24, 3, 8, 8, generator=generator), size=64, mode="bicubic").clamp(0, 1)
    return (0.8 * soft + 0.2 * torch.rand(24, 3, 64, 64, generator=generator)).clamp(0, 1)


def distances(real, images) -> dict[str, float]:
    draws = SlicedWasserstein(real).draws(images, np.full((1, len(images)), 1 / len(images)))
    return {band: values.item() for band, values in draws.items()}


def blurred(images):
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)


@pytest.mark.parametrize("size, sides", [((64, 64), [64, 32, 16]), ((40, 36), [36, 18]), ((50, 33), [33, 17])])
def test_the_pyramid_ends_at_sixteen_and_gives_the_image_back(size, sides):
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    bands = laplacian_pyramid(images)
    assert [min(band.shape[-2:]) for band in bands] == sides
    *finer, smallest = bands
    for band in reversed(finer):  # as Burt and Adelson enlarge: zeros between, then the same kernel times 4
        spread = torch.zeros_like(band)
        spread[..., ::2, ::2] = smallest
        tap = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=torch.float64) / 16
        kernel = torch.outer(tap, tap).expand(3, 1, 5, 5)
        smallest = band + 4 * F.conv2d(F.pad(spread, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    torch.testing.assert_close(smallest, images)
    flat = laplacian_pyramid(torch.full((1, 3, 64, 64), 0.3, dtype=torch.float64))
    assert all(band.abs().max() < 1e-12 for band in flat[:-1]) and torch.allclose(flat[-1], flat[-1].new_tensor(0.3))


def test_equal_sets_in_any_order_have_no_distance(pictures):
    assert list(distances(pictures, pictures.flip(0))) == ["swd-64", "swd-32", "swd-16"]
    assert max(distances(pictures, pictures.flip(0)).values()) < 1e-5


def test_a_change_is_seen_in_its_own_band(pictures):
    brighter = distances(pictures, pictures + 0.1)
    assert max(brighter["swd-64"], brighter["swd-32"]) < 1e-4 < 0.05 < brighter["swd-16"]
    blur = distances(pictures, blurred(pictures))
    assert blur["swd-64"] > 0.2 and blur["swd-64"] > 3 * blur["swd-32"] > 3 * blur["swd-16"]


def test_a_shift_of_the_coarsest_band_has_the_length_of_its_projections(pictures):
    """All patches move by 0.1 / std along every direction's sum of weights: a shift's distance is known exactly."""
    real = SlicedWasserstein(pictures)
    _, std, directions = real.scales[-1]
    shift = (0.1 / std).flatten().repeat_interleave(49) @ directions  # (DIRECTIONS,)
    assert distances(pictures, pictures + 0.1)["swd-16"] == pytest.approx(shift.abs().mean().item(), rel=1e-4)


def test_it_is_the_area_between_the_sorted_lists(pictures):
    """The slow reference: every band's patches, standardised, projected, sorted, in float64."""
    real, others = pictures[:12], blurred(pictures[12:])
    measured = SlicedWasserstein(real)
    found = distances(real, others)
    for level, band in enumerate(measured.bands):
        x, y = (
            band_patches(laplacian_pyramid(part.double())[level], level).movedim(2, 0).flatten(1).reshape(3, -1, 49)
            for part in (others, real)
        )
        mean, std = y.mean((1, 2), keepdim=True), y.std((1, 2), keepdim=True)
        directions = measured.scales[level][2].double()
        x, y = (((part - mean) / std).transpose(0, 1).flatten(1) @ directions for part in (x, y))
        expected = (x.sort(0).values - y.sort(0).values).abs().mean().item()
        assert found[band] == pytest.approx(expected, rel=0.02)


def test_a_draw_is_the_set_with_its_images_repeated(pictures):
    real, images = pictures[:12], pictures[12:]
    weights = bootstrap_weights(12, draws=2, seed=0)
    draws = SlicedWasserstein(real).draws(images, weights)
    for row in range(3):
        repeated = images.repeat_interleave(torch.from_numpy((12 * weights[row]).round().astype(int)), dim=0)
        for band, value in distances(real, repeated).items():
            assert draws[band][row] == pytest.approx(value, rel=1e-4)


def test_files_are_measured_as_tensors_are(pictures, tmp_path):
    bytes_of = (pictures * 255).round().byte()
    files = [tmp_path / f"{i}.png" for i in range(24)]
    for file, image in zip(files, bytes_of):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    images = bytes_of.float() / 255
    expected = distances(images[:12], images[12:])
    assert distances(files[:12], files[12:]) == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_measured_is_said(pictures):
    with pytest.raises(ValueError, match="SWD needs real images, found none"):
        SlicedWasserstein(pictures[:0])
    with pytest.raises(ValueError, match="at least 7 pixels a side, found 6x9"):
        SlicedWasserstein(torch.rand(2, 3, 6, 9))
    with pytest.raises(ValueError, match=r"images of one size, found \(32, 32\)"):
        SlicedWasserstein(pictures).draws(torch.rand(2, 3, 32, 32), np.full((1, 2), 0.5))
