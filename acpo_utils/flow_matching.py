"""Late-step samples and L_diff of flow-matching models (section 3.3, eqs. 5 and 8), on noise levels sigma in place of timesteps.

z_sigma = (1 - sigma) x0 + sigma eps, and the model predicts the velocity v = eps - x0 (Lipman et al. 2023; Esser et al. 2024).
The late window is sigma < tmax / 1000: models of the diffusers families are told 1000 sigma, or sigma. Every sum is in fp32,
since bf16 rounds a sigma to two or three digits. docs/flow-matching.md says what differs from the noise-predicting models.
"""

from collections.abc import Callable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from acpo_utils.losses import keep_gradients
from acpo_utils.randomness import batch_rand, move_drawn, own_rows


WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none")  # those of diffusers' scripts
MOST_STEPS = 1000


def _per_sample(sigmas: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """(B,) as (B, 1, ...) in fp32 on the device of `latents` (B, ...)."""
    return sigmas.to(latents.device, torch.float32).view(-1, *[1] * (latents.ndim - 1))


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """z_sigma = (1 - sigma) x0 + sigma eps: (B, ...) in the dtype of `latents`. `sigmas`: (B,) in [0, 1]."""
    sigmas = _per_sample(sigmas, latents)
    return ((1 - sigmas) * latents + sigmas * noise).to(latents.dtype)


def sample_late_sigmas(
    batch_size: int, tmax: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(B,) in fp32, uniform in 0 < sigma < tmax / 1000: the late window. Drawn on the generator's device."""
    # Not 0 and not 1, whose products, rounded, are not inside of the window.
    uniform = batch_rand(batch_size, generator, device).clamp(1e-6, 1 - 1e-6)
    return uniform * (tmax / 1000)


def denoise_late_steps(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    model_pred: torch.Tensor,
    sigmas: torch.Tensor,
    noisy_latents: torch.Tensor,
    num_steps: int = 1,
    backprop_steps: int | None = None,
) -> torch.Tensor:
    """z_0_hat of eq. 5: K Euler steps of dz = v dsigma from z_sigma down to 0, with gradient.

    K = 1 is the one-step estimate z_sigma - sigma v. For K > 1 each sample walks its own even grid sigma, sigma (K-1)/K, ...,
    sigma/K, 0. The first prediction is given: the anchor has needed it already.

    Args:
        predict: (latents (B, ...), sigmas (B,)) -> velocity (B, ...), the model with its LoRA.
        model_pred: (B, ...) its velocity at `noisy_latents`, `sigmas`.
        backprop_steps: how many of the last predictions keep their gradient (None: all K).
    Returns:
        (B, ...) in fp32.
    Raises:
        ValueError: if num_steps < 1 or backprop_steps is outside 1..num_steps.
    """
    latents = noisy_latents.float()
    for k, with_gradient in enumerate(keep_gradients(num_steps, backprop_steps)):
        if k > 0:
            with torch.set_grad_enabled(with_gradient and torch.is_grad_enabled()):
                model_pred = predict(latents.to(noisy_latents.dtype), sigmas * ((num_steps - k) / num_steps))
        elif not with_gradient:
            model_pred = model_pred.detach()
        latents = latents - _per_sample(sigmas / num_steps, latents) * model_pred.float()
    return latents


def check_late_window(schedule: Callable[[int], torch.Tensor], tmax: int, num_inference_steps: int) -> None:
    """Raises ValueError, with the number of steps that would do, if sampling takes no step at 0 < sigma < tmax / 1000.

    Nothing that is trained in such a window would ever be sampled.

    Args:
        schedule: number of steps -> sigmas (steps + 1,), falling, the last one 0: a family's `schedule`.
    """

    def last_sigma(steps: int) -> float:
        return schedule(steps)[-2].item()

    if 1000 * last_sigma(num_inference_steps) < tmax:
        return
    enough = next((n for n in range(num_inference_steps, MOST_STEPS + 1) if 1000 * last_sigma(n) < tmax), None)
    remedy = f"at least {enough} steps" if enough else "a larger --tmax, which no number of steps replaces"
    raise ValueError(
        f"{num_inference_steps} sampling steps (--num_inference_steps) end at sigma = {last_sigma(num_inference_steps):.3f}, "
        f"none below --tmax {tmax} / 1000: take {remedy}{' or a larger --tmax' if enough else ''}"
    )


@torch.no_grad()
def rollout_late_latents(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    schedule: torch.Tensor,
    noise: torch.Tensor,
    tmax: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """On-policy start of the late window: Euler steps from noise with the current model until sigma < tmax / 1000.

    Args:
        predict: (latents (B, ...), sigmas (B,)) -> velocity (B, ...), guided as sampling is. Its latents have noise's dtype.
        schedule: (steps + 1,) sigmas as in `check_late_window`, which has found it fit. noise: (B, ...) eps.
    Returns:
        (B, ...) samples in the dtype of `noise`, and (B,) their sigma, the first of the schedule that lies in the window.
    """
    latents = noise.float()
    for sigma, next_sigma in zip(schedule, schedule[1:]):
        if 1000 * sigma < tmax:
            break
        sigmas = sigma.to(noise.device).repeat(len(noise))
        latents = latents + (next_sigma - sigma).item() * predict(latents.to(noise.dtype), sigmas).float()
    return latents.to(noise.dtype), sigma.to(noise.device).repeat(len(noise))


def sample_sigmas(
    noise_scheduler: FlowMatchEulerDiscreteScheduler,
    batch_size: int,
    generator: torch.Generator | None,
    device: torch.device | str,
    weighting_scheme: str,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> torch.Tensor:
    """(B,) sigmas of L_diff in fp32, of the scheduler's own grid for training, by the density of `weighting_scheme`.

    As in diffusers' scripts. The grid is that of a scheduler as it was made, since `set_timesteps` puts the schedule of sampling
    in its place: shifted for a fixed shift (SD3), even for one that depends on the size (FLUX.1-dev).
    """
    grid = type(noise_scheduler).from_config(noise_scheduler.config).sigmas  # (1000,)
    rows, num_processes = own_rows(batch_size, generator)
    density = compute_density_for_timestep_sampling(
        weighting_scheme,
        batch_size * num_processes,
        logit_mean=logit_mean,
        logit_std=logit_std,
        mode_scale=mode_scale,
        device=generator.device if generator is not None else device,
        generator=generator,
    )[rows]
    indices = (density * len(grid)).long().clamp(max=len(grid) - 1).cpu()
    return move_drawn(grid[indices], device)


def flow_loss(
    model_pred: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    weighting_scheme: str = "none",
) -> torch.Tensor:
    """L_diff = E w(sigma) ||(eps - x0) - v_phi(z_sigma, sigma, c)||^2, eq. 8 in the model's own units. Returns a scalar.

    In fp32, the mean over elements. w is `compute_loss_weighting_for_sd3` of diffusers: 1 / sigma^2 for "sigma_sqrt",
    2 / (pi (1 - 2 sigma + 2 sigma^2)) for "cosmap", 1 for the others, which weight by how often a sigma is drawn.
    """
    target = noise.float() - latents.float()
    weights = compute_loss_weighting_for_sd3(weighting_scheme, _per_sample(sigmas, latents))
    return (weights * (model_pred.float() - target).pow(2)).mean()
