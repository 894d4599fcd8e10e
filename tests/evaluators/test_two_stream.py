"""TwoStreamIQA: the gradient map against scipy, eq. 4's contract, sizes, saving and loading."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import ndimage

from acpo_utils.evaluators import check_evaluator
from acpo_utils.evaluators.two_stream import TwoStreamIQA, gradient_map


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = TwoStreamIQA(widths=(4, 6, 8, 10), fusion_width=12)
    model.train()
    for _ in range(30):  # statistics of the normalisation that are not those of a fresh model
        model(torch.rand(4, 3, 48, 48))
    return model.eval()


def images(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_gradient_map_is_the_sobel_magnitude():
    x = images(2, 3, 33, 47).double()
    channels = x.numpy().reshape(-1, 33, 47)
    expected = [
        np.hypot(ndimage.sobel(c, 0, mode="nearest"), ndimage.sobel(c, 1, mode="nearest")) / 4 for c in channels
    ]
    expected = np.sqrt(np.reshape(expected, x.shape) ** 2 + 1e-6) - 1e-3  # the floor that keeps the derivative finite
    np.testing.assert_allclose(gradient_map(x).numpy(), expected, atol=1e-12)


def test_gradient_map_of_a_step_and_of_a_flat_image():
    step = torch.zeros(1, 1, 5, 6)
    step[..., 3:] = 1
    magnitude = gradient_map(step)[0, 0]
    assert magnitude[2].tolist() == pytest.approx([0, 0, 1, 1, 0, 0], abs=1e-3)
    flat = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    output = gradient_map(flat)
    output.sum().backward()
    assert output.abs().max() == 0 and flat.grad.isfinite().all()


def test_gradcheck_in_double_precision(model):
    assert torch.autograd.gradcheck(gradient_map, images(1, 2, 5, 6).double().requires_grad_(True))
    double = copy.deepcopy(model).double()
    x = images(1, 3, 32, 32).double().requires_grad_(True)
    # A few directions, not all 3,072 pixels; away from the kinks of ReLU the difference quotient is exact to its order.
    assert torch.autograd.gradcheck(double, x, eps=1e-7, atol=1e-6, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_images_have_a_finite_gradient(model, value):
    x = torch.full((2, 3, 40, 40), value, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.score(x).sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [(32, 32), (33, 61), (96, 32), (130, 75)])
def test_the_contract_at_any_size(model, size):
    scores = check_evaluator(model, images(3, 3, *size))
    assert scores.shape == (3,) and ((scores > 0) & (scores < 1)).all()


def test_both_streams_and_every_part_of_the_image_count(model):
    x = images(1, 3, 64, 96)
    (gradient,) = torch.autograd.grad(model.score(x.requires_grad_(True)).sum(), x)
    blocks = torch.nn.functional.avg_pool2d(gradient.abs().sum(1), 16)
    assert (blocks > 0).all()
    dark, bright = model.describe(x.detach() / 2), model.describe(x.detach() / 2 + 0.5)
    assert dark.shape == (1, 40)
    change = (bright - dark).abs()
    assert change[:, :20].max() > 0.01 and change[:, 20:].max() < 1e-4  # a gradient map has no brightness
    assert (model.describe(x.detach()) - dark).abs()[:, 20:].max() > 0.01  # but contrast


def test_a_score_does_not_depend_on_the_batch(model):
    x = images(5, 3, 48, 40)
    together = model.score(x, ["ignored"] * 5)
    torch.testing.assert_close(together, torch.cat([model.score(image[None]) for image in x]), atol=1e-6, rtol=0)


def test_scores_are_the_same_under_autocast(model):
    x = images(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low_precision = model.score(x)
    assert low_precision.dtype == torch.float32
    torch.testing.assert_close(low_precision, model.score(x), atol=0.01, rtol=0)


def test_refusals(model):
    with pytest.raises(ValueError, match=r"floats \(B, 3, H, W\), found torch.float32 \(3, 64, 64\)"):
        model.score(images(3, 64, 64))
    with pytest.raises(ValueError, match="found torch.uint8"):
        model.score(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least 32 x 32 pixels, found 64 x 31"):
        model.score(images(1, 3, 64, 31))
    with pytest.raises(ValueError, match="widths: expected four"):
        TwoStreamIQA(widths=(8, 8))


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "TwoStreamIQA" and config["score_range"] == [0.0, 100.0]
    loaded = TwoStreamIQA.from_pretrained(tmp_path)
    x = images(2, 3, 50, 64)
    assert not loaded.training and loaded.score_range == (0.0, 100.0)
    assert torch.equal(loaded.score(x), model.score(x))

    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["image_encoder.1.running_var"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing tensors, e.g. image_encoder.1.running_var"):
        TwoStreamIQA.from_pretrained(tmp_path)
