"""Flow matching's late step and loss against closed forms in float64 and against diffusers' own functions."""

from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3

from acpo_utils.flow_matching import (
    WEIGHTING_SCHEMES,
    add_noise,
    check_late_window,
    denoise_late_steps,
    flow_loss,
    rollout_late_latents,
    sample_late_sigmas,
    sample_sigmas,
)
from acpo_utils.randomness import SharedGenerator, step_generator
from tests.tiny_models import tiny_scheduler


SHAPE = (3, 4, 2, 3)
SIGMAS = torch.tensor([0.02, 0.13, 0.249])


@pytest.fixture
def clean_and_noise():
    return torch.randn(SHAPE, generator=step_generator(1)), torch.randn(SHAPE, generator=step_generator(2))


def broadcast(sigmas):
    return sigmas.double().view(-1, 1, 1, 1)


def even_sigmas(steps, last=0.0):
    """`steps` + 1 sigmas from 1 to `last`, and 0 at the end."""
    return torch.cat([torch.linspace(1, last, steps + 1)[: steps + (last == 0)], torch.zeros(int(last > 0))])


# --- Noise and back


def test_noise_is_mixed_in_fp32_and_the_exact_velocity_gives_the_clean_latents_back(clean_and_noise):
    latents, noise = clean_and_noise
    noisy = add_noise(latents, noise, SIGMAS)
    exact = (1 - broadcast(SIGMAS)) * latents.double() + broadcast(SIGMAS) * noise.double()
    torch.testing.assert_close(noisy.double(), exact, atol=1e-6, rtol=0)
    for steps in (1, 4):
        velocity = noise - latents
        found = denoise_late_steps(lambda z, sigmas: velocity, velocity, SIGMAS, noisy, steps)  # noqa: B023
        torch.testing.assert_close(found, latents, atol=1e-5, rtol=0)
    half = add_noise(latents.bfloat16(), noise.bfloat16(), SIGMAS)
    expected = add_noise(latents.bfloat16().float(), noise.bfloat16().float(), SIGMAS)
    assert half.dtype == torch.bfloat16 and torch.equal(half, expected.bfloat16()), "a sigma is not rounded to bf16"


def test_a_window_of_equal_snr_is_that_of_the_first_100_timesteps_of_stable_diffusion():
    alphas = tiny_scheduler().alphas_cumprod.double()
    ratio = ((1 - alphas) / alphas).sqrt()  # noise to signal; of flow matching sigma / (1 - sigma)
    table = {10: 0.089, 50: 0.184, 100: 0.256, 200: 0.364, 300: 0.454}
    for timestep, sigma in table.items():
        assert (ratio[timestep] / (1 + ratio[timestep])).item() == pytest.approx(sigma, abs=5e-4)


# --- The K-step chain


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_chain_of_a_linear_field_is_its_closed_form(clean_and_noise, steps):
    """v = a z: every Euler step multiplies by 1 - a sigma / K."""
    noisy, a = clean_and_noise[0], 1.7
    found = denoise_late_steps(lambda z, sigmas: a * z, a * noisy, SIGMAS, noisy, steps)
    exact = noisy.double() * (1 - a * broadcast(SIGMAS) / steps) ** steps
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-6)


def test_the_chain_is_evaluated_on_each_samples_own_even_grid(clean_and_noise):
    """v = sigma: the left sum over the grid, sigma^2 (K + 1) / (2 K), which tends to the integral sigma^2 / 2."""
    noisy, steps, seen = clean_and_noise[0], 4, []

    def predict(latents, sigmas):
        seen.append(sigmas)
        return sigmas.view(-1, 1, 1, 1).expand_as(latents)

    first = predict(noisy, SIGMAS)
    found = denoise_late_steps(predict, first, SIGMAS, noisy, steps)
    exact = noisy.double() - broadcast(SIGMAS) ** 2 * (steps + 1) / (2 * steps)
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.stack(seen), SIGMAS * torch.tensor([1, 0.75, 0.5, 0.25])[:, None])


@pytest.mark.parametrize("backprop_steps", [1, 2, 3, None])
def test_the_gradient_is_that_of_the_last_steps(backprop_steps):
    """v = w z with w trained: d/dw of z (1 - w sigma / K)^(K - n), without gradient, times (1 - w sigma / K)^n."""
    steps, sigma = 3, 0.2
    weight = torch.tensor(1.5, requires_grad=True)
    noisy = torch.full((1, 1, 1, 1), 2.0)
    z0 = denoise_late_steps(
        lambda z, sigmas: weight * z, weight * noisy, torch.tensor([sigma]), noisy, steps, backprop_steps
    )
    z0.sum().backward()
    n = backprop_steps or steps
    # z_(k + 1) = z_k - (sigma / K) v with v = w z_k. A step without gradient has a constant v; its z_k is constant then, too.
    factor = 1 - 1.5 * sigma / steps
    exact = 2.0 * factor ** (steps - n) * n * factor ** (n - 1) * (-sigma / steps)
    assert weight.grad.item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("steps, backprop_steps", [(0, None), (2, 3), (2, 0)])
def test_impossible_numbers_of_steps_are_refused(steps, backprop_steps):
    with pytest.raises(ValueError, match="expected 1 <= backprop_steps <= num_steps"):
        denoise_late_steps(None, torch.zeros(SHAPE), SIGMAS, torch.zeros(SHAPE), steps, backprop_steps)


# --- The late window


def test_late_sigmas_lie_in_the_window_and_fill_it():
    sigmas = sample_late_sigmas(20000, 250, step_generator(0))
    assert sigmas.dtype == torch.float32 and sigmas.min() > 0 and sigmas.max() < 0.25
    assert sigmas.mean().item() == pytest.approx(0.125, abs=0.002)
    quarters = torch.histc(sigmas, bins=4, min=0, max=0.25) / len(sigmas)
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), atol=0.01, rtol=0)
    assert torch.equal(sigmas, sample_late_sigmas(20000, 250, step_generator(0)))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24], ids=["least", "largest"])
def test_the_least_and_the_largest_number_that_is_drawn_are_inside_of_every_window(monkeypatch, uniform):
    monkeypatch.setattr("torch.rand", lambda size, **_: torch.full((size,), uniform))
    for tmax in range(1, 1001):
        (sigma,) = sample_late_sigmas(1, tmax)
        assert 0 < sigma < tmax / 1000 and int(1000 * sigma) < tmax, tmax


def shared(rank, num_processes):
    generator = SharedGenerator()
    generator.set_state(step_generator(3).get_state())
    generator.rank, generator.num_processes = rank, num_processes
    return generator


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_two_processes_draw_what_one_draws(scheme):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    late = partial(sample_late_sigmas, tmax=250)
    grid = lambda batch_size, generator: sample_sigmas(scheduler, batch_size, generator, "cpu", scheme)  # noqa: E731
    for draw in (late, grid):
        whole = draw(6, generator=shared(0, 1))
        halves = [draw(3, generator=shared(rank, 2)) for rank in (0, 1)]
        assert torch.equal(whole, torch.cat(halves)) and len(whole.unique()) == 6


def test_a_window_without_a_sampling_step_is_refused_with_the_number_of_steps_that_would_do():
    even = lambda steps: even_sigmas(steps)  # noqa: E731
    check_late_window(even, 250, 5)  # sigma 0.2
    with pytest.raises(ValueError) as error:
        check_late_window(even, 250, 4)  # sigma 0.25 is not below it
    message = "4 sampling steps (--num_inference_steps) end at sigma = 0.250, none below --tmax 250 / 1000: take at least 5 steps"
    assert str(error.value) == f"{message} or a larger --tmax"
    floor = lambda steps: even_sigmas(steps, last=0.009)  # noqa: E731
    with pytest.raises(ValueError, match="take a larger --tmax, which no number of steps replaces$"):
        check_late_window(floor, 5, 4)


def test_a_rollout_stops_at_the_first_sigma_in_the_window(clean_and_noise):
    """v = a z: closed form; the last prediction is asked for before the window, and none without need."""
    noise, a, asked = clean_and_noise[1], 0.4, []

    def predict(latents, sigmas):
        asked.append(sigmas)
        assert sigmas.shape == (3,) and latents.dtype == noise.dtype
        return a * latents

    latents, sigmas = rollout_late_latents(predict, torch.tensor([1.0, 0.7, 0.3, 0.2, 0.1, 0.0]), noise, 250)
    assert sigmas.tolist() == pytest.approx([0.2] * 3) and [s[0].item() for s in asked] == pytest.approx([1, 0.7, 0.3])
    exact = noise.double() * (1 - 0.3 * a) * (1 - 0.4 * a) * (1 - 0.1 * a)
    torch.testing.assert_close(latents.double(), exact, atol=1e-5, rtol=1e-5)
    assert not latents.requires_grad
    half, _ = rollout_late_latents(lambda z, s: a * z, torch.tensor([1.0, 0.2, 0.0]), noise.bfloat16(), 250)
    assert half.dtype == torch.bfloat16


# --- L_diff


def test_training_sigmas_are_the_schedulers_own_grid_whatever_was_sampled_with_it():
    """Shifted for a fixed shift (SD3: median 3/4), even for one that depends on the size (FLUX.1-dev: 1/2)."""
    fixed = FlowMatchEulerDiscreteScheduler(shift=3.0)
    dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    medians = {}
    for name, scheduler in (("fixed", fixed), ("dynamic", dynamic)):
        grid = scheduler.sigmas.clone()
        before = sample_sigmas(scheduler, 4000, step_generator(0), "cpu", "none")
        scheduler.set_timesteps(4, mu=0.7 if name == "dynamic" else None)
        after = sample_sigmas(scheduler, 4000, step_generator(0), "cpu", "none")
        assert len(scheduler.sigmas) == 5 and torch.equal(before, after) and torch.isin(before, grid).all()
        medians[name] = before.median().item()
    assert medians == {"fixed": pytest.approx(0.75, abs=0.02), "dynamic": pytest.approx(0.5, abs=0.02)}


def test_densities_are_those_of_the_flags():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    draw = partial(sample_sigmas, scheduler, 20000, step_generator(0), "cpu")
    # Grid point k of 1000 is 1 - k / 1000, so that a density u is drawn as 1 - u.
    normal = (1 - draw("logit_normal", logit_mean=0.5, logit_std=0.7)).clamp(1e-3, 1 - 1e-3).logit()
    assert normal.mean().item() == pytest.approx(0.5, abs=0.02) and normal.std().item() == pytest.approx(0.7, abs=0.02)
    for scheme in ("none", "sigma_sqrt", "cosmap"):
        assert draw(scheme).mean().item() == pytest.approx(0.5, abs=0.01)
    flat, peaked = (draw("mode", mode_scale=scale).std().item() for scale in (0.0, 1.29))
    assert flat == pytest.approx(12**-0.5, abs=0.01) and abs(peaked - flat) > 0.05


@pytest.mark.parametrize("density", [1.0, 1.5])
def test_a_density_of_1_is_the_last_of_the_grid(monkeypatch, density):
    """A sigmoid rounds to 1, and "mode" reaches it."""
    monkeypatch.setattr(
        "acpo_utils.flow_matching.compute_density_for_timestep_sampling", lambda *_, **__: torch.tensor([density])
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert sample_sigmas(scheduler, 1, None, "cpu", "none") == scheduler.sigmas[-1]


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_the_loss_is_weighted_as_diffusers_weighs_it(clean_and_noise, scheme):
    latents, noise = clean_and_noise
    pred = torch.randn(SHAPE, generator=step_generator(4))
    weights = {
        "sigma_sqrt": 1 / SIGMAS.double() ** 2,
        "cosmap": 2 / (torch.pi * (1 - 2 * SIGMAS.double() + 2 * SIGMAS.double() ** 2)),
    }.get(scheme, torch.ones(3).double())
    error = (pred.double() - (noise.double() - latents.double())) ** 2
    exact = (weights * error.flatten(1).mean(1)).mean().item()
    assert flow_loss(pred, latents, noise, SIGMAS, scheme).item() == pytest.approx(exact, rel=1e-6)
    diffusers_own = compute_loss_weighting_for_sd3(scheme, sigmas=SIGMAS.view(-1, 1, 1, 1))
    as_in_its_scripts = torch.mean((diffusers_own * (pred - (noise - latents)) ** 2).reshape(3, -1), 1).mean()
    assert exact == pytest.approx(as_in_its_scripts.item(), rel=1e-5)
    half = flow_loss(pred.bfloat16(), latents.bfloat16(), noise.bfloat16(), SIGMAS, scheme)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact, rel=0.02)
    assert flow_loss(noise - latents, latents, noise, SIGMAS, scheme).item() == 0
