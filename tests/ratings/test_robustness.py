"""How easily an evaluator is fooled, on evaluators whose answer is known."""

import io
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from scipy import stats

from acpo_utils.evaluators.worst_point import signed_step
from acpo_utils.ratings.robustness import (
    EPSILONS,
    check_originals,
    cosine,
    direction,
    low_pass,
    measure_robustness,
    robustness_tables,
    rows_to_measure,
    score_gradient,
)


FEATURES = Features({name: Image(decode=False) for name in ("image", "reference")} | {"mos": Value("float64")})


def cell(pixels):
    """An undecoded image of (H, W, 3) numbers from 0 to 255."""
    buffer = io.BytesIO()
    PILImage.fromarray(np.asarray(pixels, dtype=np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def random_rows(number=12, size=(10, 14), originals=True):
    """Pictures that no step takes to an end of the range, rated by chance, each with an original if it is to have one."""
    rng = np.random.default_rng(0)
    images, others = rng.integers(20, 236, (2, number, *size, 3))
    rows = {
        "image": [cell(image) for image in images],
        "reference": [cell(other) if originals else None for other in others],
        "mos": rng.uniform(0, 5, number),
    }
    pixels = torch.from_numpy(np.stack([images, others])).movedim(-1, 2).double() / 255  # (2, N, 3, H, W)
    return Dataset.from_dict(rows, features=FEATURES), pixels


class Linear:
    """q = 0.5 + <w, x - 0.5>: the gradient is w."""

    score_range = (0.0, 1.0)

    def __init__(self, w):
        self.w = w

    def score(self, images, prompts=None):
        return 0.5 + (self.w.to(images) * (images - 0.5)).flatten(1).sum(1)


class Nearness:
    """q = 1 - mean squared distance to one picture: the gradient is the way there."""

    score_range = (0.0, 1.0)

    def __init__(self, original):
        self.original = original

    def score(self, images, prompts=None):
        return 1 - (images - self.original.to(images)).square().flatten(1).mean(1)


class Blind:
    score_range = (0.0, 1.0)

    def score(self, images, prompts=None):
        return torch.full((len(images),), 0.5)


def test_of_a_linear_evaluator_all_is_known():
    rows, (images, originals) = random_rows()
    w = torch.randn(3, 10, 14, generator=torch.Generator().manual_seed(1)).double() / 2000
    measured = measure_robustness(Linear(w), rows)
    norm, mos = w.abs().sum().item(), np.array(rows["mos"])
    scores = Linear(w).score(images).numpy()
    robustness, found = measured["robustness"], measured["direction"]
    assert robustness["count"] == 12 and robustness["srcc"] == pytest.approx(stats.spearmanr(scores, mos).statistic)
    for epsilon in EPSILONS:
        step = robustness["steps"][str(epsilon)]
        assert step["raised"] == pytest.approx(epsilon / 255 * norm, rel=1e-4)
        assert step["lowered"] == pytest.approx(-epsilon / 255 * norm, rel=1e-4)
        attacked = scores + np.where(mos > mos.mean(), -1, 1) * epsilon / 255 * norm
        assert step["srcc"] == pytest.approx(stats.spearmanr(attacked, mos).statistic)
    assert robustness["steps"]["4"]["srcc"] < robustness["srcc"] - 0.2
    assert found["gradient_l1"] == pytest.approx(norm, rel=1e-5) and found["count"] == 12
    ways = (originals - images).flatten(1).numpy()
    flat = w.flatten().numpy()
    expected = np.mean([way @ flat / np.linalg.norm(way) / np.linalg.norm(flat) for way in ways])
    assert found["all"] == pytest.approx(expected, abs=1e-6)


def test_a_score_that_is_nearness_points_at_the_original():
    rows, (_, originals) = random_rows(number=1)
    found = measure_robustness(Nearness(originals[0]), Dataset.from_list([rows[0], rows[0]], features=FEATURES))
    assert found["direction"]["count"] == 2
    assert [found["direction"][name] for name in ("all", "low", "high")] == pytest.approx([1, 1, 1], abs=1e-6)
    assert found["robustness"]["steps"]["4"]["raised"] > 0 > found["robustness"]["steps"]["4"]["lowered"]
    assert found["robustness"]["srcc"] is None  # one score, twice


def test_frequencies_are_told_apart():
    """A flat gradient has low frequencies alone, a chequered one hardly any."""
    flat = torch.ones(1, 3, 12, 12)
    board = (-1.0) ** (torch.arange(12)[:, None] + torch.arange(12)).expand(1, 3, 12, 12)
    assert torch.equal(low_pass(flat), flat) and low_pass(board).abs().max() <= 1 / 4 + 1e-6
    inside = low_pass(torch.arange(25.0).view(1, 1, 5, 5))[0, 0, 1:4, 1:4]
    torch.testing.assert_close(inside, torch.arange(25.0).view(5, 5)[1:4, 1:4])
    found = direction(flat, flat + board)
    assert found["all"] == pytest.approx(2**-0.5) and found["low"] > 0.98 and np.isnan(found["high"])
    found = direction(board, flat + board)
    assert found["all"] == pytest.approx(2**-0.5) and found["low"] < 0.15 and found["high"] > 0.99
    assert cosine(flat, -flat) == pytest.approx(-1) and np.isnan(cosine(flat, torch.zeros_like(flat)))


def test_an_evaluator_that_ignores_the_image_has_no_direction_and_no_nan():
    rows, (images, _) = random_rows(number=3)
    scores, gradient = score_gradient(Blind(), images.float())
    assert scores.tolist() == [0.5] * 3 and torch.equal(gradient, torch.zeros_like(images).float())
    measured = measure_robustness(Blind(), rows)
    text = json.dumps(measured, allow_nan=False)
    assert json.loads(text)["direction"] == {"gradient_l1": 0, "count": 3, "all": None, "low": None, "high": None}
    assert measured["robustness"]["srcc"] is None and measured["robustness"]["steps"]["4"]["raised"] == 0
    assert "not defined | not defined | not defined" in robustness_tables({"test": measured})


def test_without_originals_the_rest_is_measured_and_that_is_said():
    rows, _ = random_rows(number=4, originals=False)
    w = torch.full((3, 10, 14), 1e-4)
    for each in (rows, rows.remove_columns("reference")):
        measured = measure_robustness(Linear(w), each)
        assert measured["direction"]["count"] == 0 and measured["direction"]["all"] is None
        assert measured["direction"]["gradient_l1"] == pytest.approx(0.042, rel=1e-4)
        tables = robustness_tables({"test": measured, "test, a group": {}})
        assert "Rows without originals (`--reference_column`) have none." in tables and "a group" not in tables
    same = Dataset.from_list([rows[0] | {"reference": rows[0]["image"]}] * 2, features=FEATURES)
    assert measure_robustness(Linear(w), same)["direction"]["count"] == 0  # an original is no way to itself


def test_the_attack_stays_within_its_bound_and_in_the_range():
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images[0, :, :3], images[1, :, :3] = 0.0, 1.0
    gradient = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    gradient[:, :, 5] = 0
    for epsilon in (4, -4):
        attacked = signed_step(images, gradient, epsilon)
        assert attacked.min() >= 0 and attacked.max() <= 1
        assert (attacked - images).abs().max() <= 4 / 255 + 1e-7
        assert torch.equal(attacked[:, :, 5], images[:, :, 5])


def test_the_rows_are_the_same_for_every_evaluator():
    rows = Dataset.from_dict({"n": range(100)})
    chosen = rows_to_measure(rows, 30)["n"][:]
    assert chosen == sorted(chosen) and len(set(chosen)) == 30 and chosen == rows_to_measure(rows, 30)["n"][:]
    assert chosen != list(range(30)) and rows_to_measure(rows, 500)["n"][:] == list(range(100))


def test_originals_are_checked_before_a_training():
    rows, _ = random_rows(number=2)
    check_originals(rows, "image", "reference")
    check_originals(rows, "image", "no_such_column")
    for bad, found in {
        "damage": ({"bytes": b"no picture", "path": None}, "expected an image, found: cannot identify"),
        "size": (cell(np.zeros((10, 13, 3))), "expected 14 x 10 pixels like the image, found 13 x 10"),
    }.values():
        wrong = Dataset.from_list([rows[0], rows[1] | {"reference": bad}], features=FEATURES)
        with pytest.raises(ValueError, match=found) as error:
            check_originals(wrong, "image", "reference")
        assert "\n" not in str(error.value) and "--reference_column reference" in str(error.value)
