"""Attacked batches and the gradient's norm in the training of an evaluator, against float64 references."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

from acpo_utils.evaluators import TwoStreamIQA
from acpo_utils.ratings.adversarial import (
    adversarial_loss,
    fix_batch_norm,
    gradient_norm,
    gradient_signs,
    is_adversarial,
    with_attacks,
)


class Plain:
    """What is asked of an accelerator."""

    @staticmethod
    def unwrap_model(model):
        return model


class Smooth(torch.nn.Module):
    """q = sigmoid(mean(w x^2)): smooth, with a gradient that is known."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.w = torch.nn.Parameter(3 * torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype))

    def forward(self, images):
        return torch.sigmoid((self.w * images.square()).flatten(1).mean(1))


def score(model, batch):
    return model(batch["images"])


def training_step(model, batch, maps=None):
    return F.l1_loss(score(model, batch).float(), batch["mos"])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 6, 6, generator=generator)
    images[0, :, :2], images[1, :, :2] = 0.0, 1.0  # pixels at the ends of the range
    return {"images": images, "mos": torch.rand(4, generator=generator), "prompts": list("abcd")}


@pytest.fixture
def two_stream():
    torch.manual_seed(0)
    model = TwoStreamIQA(widths=(4, 6, 8, 8), fusion_width=8)
    model.train()
    with torch.no_grad():
        model(torch.rand(8, 3, 48, 48))  # statistics that are none of a fresh model's
    return model


def test_the_attacked_stay_within_bound_and_range_and_keep_their_labels(batch):
    signs = gradient_signs(Smooth(), batch, score, ["images"])
    assert signs["images"].unique().tolist() == [-1, 0, 1]  # 0 where a pixel is 0
    attacked = with_attacks(batch, signs, 3.0)
    clean, up, down = attacked["images"].chunk(3)
    assert torch.equal(clean, batch["images"]) and attacked["prompts"] == list("abcd" * 3)
    assert all(torch.equal(part, batch["mos"]) for part in attacked["mos"].chunk(3))
    for moved in (up, down):
        assert moved.min() >= 0 and moved.max() <= 1 and (moved - clean).abs().max() <= 3 / 255 + 1e-7
    scores = [score(Smooth(), {"images": images}) for images in (down, clean, up)]
    assert (scores[0] < scores[1]).all() and (scores[1] < scores[2]).all()


def test_the_worse_of_both_signs_raises_the_loss_of_every_image(two_stream):
    fix_batch_norm(two_stream)
    batch = {"images": torch.rand(6, 3, 40, 40, generator=torch.Generator().manual_seed(2))}
    mos = torch.linspace(0.1, 0.9, 6)
    signs = gradient_signs(two_stream, batch, score, ["images"])
    with torch.no_grad():
        scores = score(two_stream, with_attacks(batch, signs, 1.0))
    clean, up, down = (scores - mos.repeat(3)).abs().chunk(3)
    assert (torch.maximum(up, down) > clean).all()


def test_a_third_of_the_loss_is_clean(batch):
    """In float64 by hand: one mean over the images as they are, moved up and moved down."""
    args = Namespace(adversarial_epsilon=2.0, gradient_norm_weight=0.0)
    loss, terms = adversarial_loss(
        training_step, Smooth(), batch, None, score=score, image_keys=["images"], accelerator=Plain, args=args
    )
    model, x, mos = Smooth(torch.float64), batch["images"].double(), batch["mos"].double()
    step = 2 / 255 * (model.w * x).sign()
    parts = [(model(images) - mos).abs().mean() for images in (x, (x + step).clamp(0, 1), (x - step).clamp(0, 1))]
    assert loss.item() == pytest.approx((sum(parts) / 3).item(), abs=1e-6) and terms == {}


def test_the_norm_and_what_it_trains_against_autograd_in_float64(batch):
    model, reference = Smooth(), Smooth(torch.float64)
    signs = gradient_signs(model, batch, score, ["images"])
    norm = gradient_norm(model, batch, signs, score)
    x = batch["images"].double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(reference(x).sum(), x, create_graph=True)
    exact = gradient.abs().flatten(1).sum(1)  # (4,)
    torch.testing.assert_close(norm.double(), exact, rtol=2e-3, atol=0)
    norm.mean().backward()
    exact.mean().backward()
    error = (model.w.grad.double() - reference.w.grad).norm() / reference.w.grad.norm()
    assert error < 5e-3

    args = Namespace(adversarial_epsilon=0.0, gradient_norm_weight=0.5)
    loss, terms = adversarial_loss(
        training_step, Smooth(), batch, None, score=score, image_keys=["images"], accelerator=Plain, args=args
    )
    clean = training_step(Smooth(), batch)
    assert loss.item() == pytest.approx(clean.item() + 0.5 * exact.mean().item(), rel=2e-3)
    assert terms["gradient_norm"].item() == pytest.approx(exact.mean().item(), rel=2e-3)


def test_the_statistics_stay_and_no_image_depends_on_its_neighbours(two_stream):
    before = {name: value.clone() for name, value in two_stream.named_buffers()}
    images = torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(3))
    fix_batch_norm(two_stream)
    assert two_stream.training
    together = gradient_signs(two_stream, {"images": images}, score, ["images"])["images"]
    alone = [gradient_signs(two_stream, {"images": image}, score, ["images"])["images"] for image in images.split(1)]
    assert (together == torch.cat(alone)).double().mean() > 0.999  # but for rounding
    assert all(torch.equal(value, before[name]) for name, value in two_stream.named_buffers())
    assert all(parameter.grad is None for parameter in two_stream.parameters())


def test_what_a_score_does_not_look_at_is_not_moved(batch):
    batch["crops"] = torch.rand(4, 0, 3, 6, 6)
    signs = gradient_signs(Smooth(), batch, score, ["images", "crops"])
    assert signs["crops"].shape == (4, 0, 3, 6, 6)
    assert with_attacks(batch, signs, 1.0)["crops"].shape == (12, 0, 3, 6, 6)


def test_off_means_off():
    assert not is_adversarial(Namespace(adversarial_epsilon=0.0, gradient_norm_weight=0.0))
    assert is_adversarial(Namespace(adversarial_epsilon=1.0, gradient_norm_weight=0.0))
    assert is_adversarial(Namespace(adversarial_epsilon=0.0, gradient_norm_weight=1e-3))
