"""The share of each term of eq. 9 in the gradient, against gradients taken by hand in float64."""

import logging

import pytest
import torch
from accelerate import Accelerator

from acpo_utils.training.gradient_balance import BUCKETS, FLOOR, PATIENCE, GradientBalance
from acpo_utils.training.run import mean_terms


@pytest.fixture
def model():
    torch.manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.randn(3, 4)),
        torch.nn.Parameter(torch.randn(4)),
        torch.nn.Parameter(torch.ones(2)),
    ]
    x = torch.randn(8, 3)

    def terms(dtype=torch.float32):
        first, second = (weight.to(dtype) for weight in weights[:2])  # the third takes no part in any loss
        out = torch.tanh(x.to(dtype) @ first + second)  # (8, 4)
        scores = torch.sigmoid(out.sum(1))
        values = {"loss_diffusion": out.square().mean(), "loss_anchor": (out - 1).square().mean()}
        values |= {"loss_quality": (1 - scores).mean(), "score": scores}
        return values | {"late_timesteps": torch.tensor([0, 24, 25, 49, 50, 99, 98, 0])}

    return weights, terms


def norm_by_hand(weights, loss):
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm().item()


def test_norms_and_shares(model):
    weights, terms = model
    logs = GradientBalance(Accelerator(cpu=True), weights, tmax=100, every=1).measure(terms(), 1.0, 10.0, 0.5, step=1)
    exact = terms(torch.float64)
    expected = {
        name: weight * norm_by_hand(weights, exact[name])
        for name, weight in {"loss_diffusion": 1.0, "loss_anchor": 10.0, "loss_quality": 0.5}.items()
    }
    for name, value in expected.items():
        assert logs[f"balance/{name}_grad_norm"] == pytest.approx(value, rel=1e-5)
        assert logs[f"balance/{name}_share"] == pytest.approx(value / sum(expected.values()), rel=1e-5)
    assert logs["balance/loss_anchor_weight"] == 10.0


def test_the_guides_gradient_by_timestep(model):
    weights, terms = model
    values = terms()
    logs = GradientBalance(Accelerator(cpu=True), weights, tmax=100, every=1).measure(values, 1.0, 1.0, 0.1, step=1)
    exact = terms(torch.float64)
    for window, rows in {"0_to_24": [0, 1, 7], "25_to_49": [2, 3], "50_to_74": [4], "75_to_99": [5, 6]}.items():
        expected = norm_by_hand(weights, (1 - exact["score"][rows]).mean())
        assert logs[f"balance/quality_grad_norm_t_{window}"] == pytest.approx(expected, rel=1e-5)
    values["late_timesteps"] = torch.full((8,), 60)  # a bucket that the batch does not reach has no number
    logs = GradientBalance(Accelerator(cpu=True), weights, tmax=100, every=1).measure(values, 1.0, 1.0, 0.1, step=1)
    assert [name for name in logs if "_t_" in name] == ["balance/quality_grad_norm_t_50_to_74"]


@pytest.mark.parametrize("tmax", [1, 3, 10, 101, 1000])
def test_every_timestep_has_its_bucket(model, tmax):
    weights, terms = model
    balance = GradientBalance(Accelerator(cpu=True), weights, tmax, every=1)
    seen = set()
    for timestep in {0, tmax // 2, tmax - 1}:
        values = terms() | {"late_timesteps": torch.full((8,), timestep)}
        (name,) = [name for name in balance.measure(values, 0.0, 0.0, 1.0, step=1) if "_t_" in name]
        first, last = map(int, name.split("_t_")[1].split("_to_"))
        assert 0 <= first <= timestep <= last < tmax
        seen.add(name)
    assert len(seen) <= BUCKETS


def test_the_training_goes_on_as_if_nothing_had_been_measured(model):
    weights, terms = model
    plain = terms()
    (plain["loss_diffusion"] + plain["loss_quality"]).backward()
    expected = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    state, measured = torch.get_rng_state(), terms()
    GradientBalance(Accelerator(cpu=True), weights, 100, every=1).measure(measured, 1.0, 0.0, 1.0, step=1)
    assert all(weight.grad is None for weight in weights) and torch.equal(torch.get_rng_state(), state)
    (measured["loss_diffusion"] + measured["loss_quality"]).backward()
    assert all(grad is weight.grad or torch.equal(grad, weight.grad) for grad, weight in zip(expected, weights))


def test_a_term_without_a_share_is_named_once(model, caplog):
    weights, terms = model
    balance = GradientBalance(Accelerator(cpu=True), weights, 100, every=1)
    with caplog.at_level(logging.WARNING):
        for step in range(1, PATIENCE):
            balance.measure(terms(), 1.0, 1.0, 1e-6, step)
        resumed = GradientBalance(Accelerator(cpu=True), weights, 100, every=1)
        resumed.load_state_dict(balance.state_dict())
        assert not caplog.records
        logs = resumed.measure(terms(), 1.0, 1.0, 1e-6, PATIENCE)
        assert logs["balance/loss_quality_share"] < FLOOR
        resumed.measure(terms(), 1.0, 1.0, 1e-6, PATIENCE + 1)
    (record,) = caplog.records
    assert "loss_quality" in record.message and "--quality_weight" in record.message
    assert resumed.measure(terms(), 1.0, 1.0, 1.0, 9) and resumed.below_floor["loss_quality"] == 0


def test_what_is_logged_is_the_mean_of_each_term():
    terms = {"loss": torch.tensor(2.5, requires_grad=True), "score": torch.tensor([0.25, 0.75])}
    terms |= {"late_timesteps": torch.tensor([3, 4]), "half": torch.tensor([1.5], dtype=torch.bfloat16)}
    assert mean_terms(Accelerator(cpu=True), terms) == {"loss": 2.5, "score": 0.5, "half": 1.5}
