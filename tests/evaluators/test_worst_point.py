"""The guide at the worst point near an image: where it is, what it weighs, and whose gradient it leaves."""

import pytest
import torch

from acpo_utils.evaluators import WeightedEvaluators
from acpo_utils.evaluators.worst_point import guide_score, worst_point


class Quadratic:
    """Q(x) = 0.5 + 0.4 mean(w x^2): gradient and worst point are known."""

    score_range = (0.0, 1.0)

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.w = torch.randn(3, 8, 8, generator=generator).clamp(-1, 1).to(dtype)

    def score(self, images, prompts=None):
        return 0.5 + 0.4 * (self.w.to(images) * images.square()).flatten(1).mean(1)

    def gradient(self, images):
        return 0.8 * self.w.to(images) * images / images[0].numel()


@pytest.fixture
def images():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images[0, :, :2] = 0.0  # pixels at the ends of the range
    images[1, :, :2] = 1.0
    return images


def test_without_a_perturbation_it_is_the_clean_score_and_one_call(images):
    calls = []

    class Counting(Quadratic):
        def score(self, images, prompts=None):
            calls.append(prompts)
            return super().score(images, prompts)

    scores, parts = guide_score(Counting(), images, ["a"] * 4)
    assert torch.equal(scores, Quadratic().score(images)) and parts == {} and calls == [["a"] * 4]


def test_the_worst_point_is_one_signed_step_down_inside_the_range(images):
    guide = Quadratic()
    moved = worst_point(guide, images, None, 2.0)
    expected = (images - 2 / 255 * guide.gradient(images).sign()).clamp(0, 1)
    torch.testing.assert_close(moved, expected)
    assert moved.min() >= 0 and moved.max() <= 1 and (moved - images).abs().max() <= 2 / 255 + 1e-7
    assert (guide.score(moved) < guide.score(images)).all()


@pytest.mark.parametrize("clean_weight", [0.0, 0.35, 1.0])
def test_value_and_gradient_against_a_float64_reference(images, clean_weight):
    guide = Quadratic()
    inputs = images.clone().requires_grad_(True)
    scores, parts = guide_score(guide, inputs, None, 2.0, clean_weight)
    (gradient,) = torch.autograd.grad(scores.sum(), inputs)

    reference, x = Quadratic(torch.float64), images.double()
    step = x - 2 / 255 * reference.gradient(x).sign()
    worst = step.clamp(0, 1)
    clean_scores, worst_scores = reference.score(x), reference.score(worst)
    expected = clean_weight * clean_scores + (1 - clean_weight) * worst_scores
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts["clean_score"].double(), clean_scores, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts["score_fall"].double(), clean_scores - worst_scores, atol=1e-6, rtol=0)
    inside = ((step >= 0) & (step <= 1)).double()  # what was cut off passes no gradient on
    expected = clean_weight * reference.gradient(x) + (1 - clean_weight) * inside * reference.gradient(worst)
    torch.testing.assert_close(gradient.double(), expected, atol=1e-7, rtol=0)


def test_it_works_where_no_gradient_is_kept_and_under_autocast(images):
    guide = Quadratic()
    with torch.no_grad():
        scores, _ = guide_score(guide, images, None, 2.0, 0.5)
    assert not scores.requires_grad and (scores < guide.score(images)).all()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(worst_point(guide, images, None, 2.0), worst_point(Quadratic(), images, None, 2.0))


def test_of_several_guides_the_worst_point_is_that_of_their_mean_and_the_parts_are_the_clean_ones(images):
    class Dark(Quadratic):
        def score(self, images, prompts=None):
            return 0.9 - 0.5 * images.flatten(1).mean(1)

    first, second = Quadratic(), Dark()
    both = WeightedEvaluators({"first": first, "second": second}, [0.7, 0.3])
    scores, parts = guide_score(both, images, None, 3.0, 0.25)
    gradient = 0.7 * first.gradient(images) - 0.3 * 0.5 / images[0].numel()
    worst = (images - 3 / 255 * gradient.sign()).clamp(0, 1)
    expected = 0.25 * both.score(images) + 0.75 * both.score(worst)
    torch.testing.assert_close(scores, expected)
    guide_score(both, images, None, 3.0, 0.25)
    torch.testing.assert_close(both.last_scores["second"], second.score(images).mean())
