"""The anchor's weight finds the limit on the anchor loss, and a resumed run finds it as an uninterrupted one."""

import json
import math
import shutil

import pytest
import torch

from acpo_utils.anchor import INTEGRAL, PROPORTIONAL, SMOOTHING, AnchorBudget
from tests import REPOSITORY
from tests.launching import refused, run_script


SCRIPT = REPOSITORY / "examples" / "train_acpo_lora_sd.py"


def test_the_weight_follows_the_formula():
    budget, multiplier, total, count = AnchorBudget(0.02, 3.0), 3.0, 0.0, 0.0
    for loss in (0.0, 0.01, 0.05, 0.5, 0.02):
        total, count = SMOOTHING * total + loss, SMOOTHING * count + 1
        error = min(max(math.log(max(total / count, 1e-9) / 0.02), -0.5), 1)
        multiplier *= math.exp(INTEGRAL * error)
        assert budget.update(loss) == pytest.approx(multiplier * math.exp(PROPORTIONAL * error), rel=1e-12)
    again = AnchorBudget(0.02, 1.0)
    again.load_state_dict(budget.state_dict())
    assert again.update(math.nan) == budget.weight
    assert again.update(0.03) == budget.update(0.03)
    for budget, weight in ((0, 1), (-1, 1), (1, 0), (math.nan, 1)):
        with pytest.raises(ValueError, match="expected an anchor budget and weight above 0"):
            AnchorBudget(budget, weight)


@pytest.mark.parametrize("start", [0.01, 1.0, 1000.0])
def test_a_model_that_answers_to_the_weight_ends_at_the_budget(start):
    """Drift falls with the anchor's weight, as in training, with noise from batch to batch."""
    budget, generator = AnchorBudget(0.005, start), torch.Generator().manual_seed(0)
    drifts = []
    for _ in range(600):
        drifts.append(0.05 / (1 + budget.weight))
        budget.update(drifts[-1] * torch.rand((), generator=generator).item() * 2)
    assert sum(drifts[-200:]) / 200 == pytest.approx(0.005, rel=0.15)


def test_a_model_that_moves_at_one_pace_is_not_swung_to_and_fro():
    """As Adam does: the amplitude of the LoRA's output follows the sign of guide against anchor, not their strength."""
    budget, amplitude, drifts = AnchorBudget(0.003, 1.0), 0.0, []
    for _ in range(400):
        drifts.append(amplitude**2)
        amplitude = max(amplitude + 0.002 * math.tanh(3 * (0.25 - budget.weight * amplitude) / 0.25), 0.0)
        budget.update(drifts[-1])
    assert max(drifts) < 3 * 0.003 and min(drifts[150:]) > 0.5 * 0.003
    assert sum(drifts[-100:]) / 100 == pytest.approx(0.003, rel=0.1)


def test_the_training_adapts_its_weight_and_resumes_exactly(sd_flags, lora_of, tmp_path):
    options = {"anchor_budget": 1e-6, "quality_weight": 10, "checkpointing_steps": 2, "report_to": "tensorboard"}
    run_script(SCRIPT, *sd_flags("whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run_script(SCRIPT, *sd_flags("resumed", resume_from_checkpoint="latest", **options))
    whole, resumed = lora_of("whole"), lora_of("resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    run_script(SCRIPT, *sd_flags("fixed", **options | {"anchor_budget": None}))
    assert any(not torch.equal(whole[name], weight) for name, weight in lora_of("fixed").items())
    assert json.loads((tmp_path / "whole" / "args.json").read_text())["anchor_weight"] == 1, "what was asked for"


def test_a_budget_is_above_0_and_needs_an_anchor(sd_flags):
    out = refused(SCRIPT, *sd_flags(anchor_budget=0.1, anchor_weight=0))
    assert "--anchor_budget needs an --anchor_weight above 0 to start from" in out
    assert "--anchor_budget: expected a number above 0, found 0.0" in refused(SCRIPT, *sd_flags(anchor_budget=0))


def test_without_a_budget_the_weight_stays():
    fixed = AnchorBudget(None, 3.0)
    assert [fixed.update(loss) for loss in (0.5, None, math.nan)] == [3.0, 3.0, 3.0]
    again = AnchorBudget(None, 1.0)
    again.load_state_dict(json.loads(json.dumps(fixed.state_dict())))
    assert again.update(0.5) == 3.0
    assert AnchorBudget(None, 0.0).update(None) == 0.0
