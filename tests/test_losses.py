import numpy as np
import pytest
import torch

from acpo_utils.losses import (
    acpo_objective,
    anchor_loss,
    diffusion_loss,
    diffusion_target,
    keep_gradients,
    quality_loss,
)
from tests.tiny_models import tiny_scheduler


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(0)
    latents, noise, pred = (torch.randn(3, 4, 6, 5, generator=generator) for _ in range(3))
    return latents, noise, pred, torch.tensor([0, 57, 999])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_diffusion_loss_against_float64(sample, prediction_type):
    latents, noise, pred, timesteps = sample
    scheduler = tiny_scheduler(prediction_type=prediction_type)
    abar = scheduler.alphas_cumprod.double().numpy()[timesteps].reshape(-1, 1, 1, 1)
    x0, eps = latents.double().numpy(), noise.double().numpy()
    target = {"epsilon": eps, "v_prediction": np.sqrt(abar) * eps - np.sqrt(1 - abar) * x0, "sample": x0}[
        prediction_type
    ]
    expected = ((pred.double().numpy() - target) ** 2).mean()
    assert diffusion_loss(scheduler, pred, latents, noise, timesteps).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighting_against_float64(sample, prediction_type):
    latents, noise, pred, timesteps = sample
    scheduler = tiny_scheduler(prediction_type=prediction_type)
    abar = scheduler.alphas_cumprod.double()[timesteps]
    snr = abar / (1 - abar)
    weights = snr.clamp(max=5.0) / (snr if prediction_type == "epsilon" else snr + 1)
    target = diffusion_target(scheduler, latents, noise, timesteps).double()
    expected = (weights * ((pred.double() - target) ** 2).mean((1, 2, 3))).mean().item()
    assert diffusion_loss(scheduler, pred, latents, noise, timesteps, snr_gamma=5.0).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_unknown_prediction_type_is_named(sample):
    scheduler = tiny_scheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="'flow'"):
        diffusion_target(scheduler, *sample[:2], sample[3])


def test_anchor_loss_is_the_mean_square_and_trains_only_the_student():
    student, base = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3, requires_grad=True)
    loss = anchor_loss(student, base)
    loss.backward()
    assert loss.item() == pytest.approx(((student - base).double() ** 2).mean().item(), rel=1e-5)
    assert torch.allclose(student.grad, 2 * (student - base).detach() / student.numel(), atol=1e-7)
    assert base.grad is None


def test_quality_loss_by_hand():
    # scores 0.2, 0.4, 0.9: distances to the best score are 0.8, 0.6, 0.1, mean 0.5; each score's gradient is -1/3.
    scores = torch.tensor([0.2, 0.4, 0.9], requires_grad=True)
    loss = quality_loss(scores)
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert torch.allclose(scores.grad, torch.full((3,), -1 / 3))


def test_objective_is_eq_9_and_names_its_terms():
    total, terms = acpo_objective(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(0.5), 1.0, 10.0, 0.1)
    assert total.item() == pytest.approx(2.0 + 30.0 + 0.05)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {"loss": 32.05, "loss_diffusion": 2.0, "loss_anchor": 3.0, "loss_quality": 0.5}
    )


def test_objective_without_quality_and_anchor_is_the_plain_diffusion_loss():
    total, terms = acpo_objective(torch.tensor(0.25), None, None)
    assert total.item() == 0.25 and set(terms) == {"loss", "loss_diffusion"}
    with pytest.raises(ValueError, match="nothing to optimise"):
        acpo_objective(None, None, None)


def test_the_last_steps_keep_their_gradient():
    assert keep_gradients(3) == [True, True, True] and keep_gradients(1, 1) == [True]
    assert keep_gradients(3, 2) == [False, True, True]
    for num_steps, backprop_steps in ((0, None), (2, 3), (2, 0)):
        with pytest.raises(ValueError, match=f"<= num_steps, got .* and {num_steps}"):
            keep_gradients(num_steps, backprop_steps)
