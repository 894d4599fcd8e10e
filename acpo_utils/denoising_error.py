"""The MSE of the paper's table 1: L_diff (eq. 8) of held-out images, each at the same noise and timesteps every time."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from acpo_utils.losses import diffusion_target
from acpo_utils.seeds import step_generator


MSE_TIMESTEPS = 10


def denoising_errors(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise_scheduler,
    x0: torch.Tensor,
    rows: Sequence[int],
    seed: int,
) -> torch.Tensor:
    """Mean squared error of `predict` over `MSE_TIMESTEPS` timesteps spread evenly over the whole range.

    Args:
        predict: (z_t (B, C, h, w), timesteps (B,)) -> prediction (B, C, h, w).
        x0: (B, C, h, w), clean images in [-1, 1], or latents. rows: their B numbers, from which the noise is drawn.
    Returns:
        (B,) error against the scheduler's own target (noise, velocity or sample), fp32; lower is better.
    """
    total = noise_scheduler.config.num_train_timesteps
    error = torch.zeros(len(x0), device=x0.device)
    for k in range(MSE_TIMESTEPS):
        timesteps = torch.full((len(x0),), int((k + 0.5) * total / MSE_TIMESTEPS), device=x0.device)  # (B,)
        noise = fixed_noise(x0, seed, rows, k)  # (B, C, h, w)  eps
        model_pred = predict(noise_scheduler.add_noise(x0, noise, timesteps), timesteps)
        target = diffusion_target(noise_scheduler, x0, noise, timesteps)
        error += F.mse_loss(model_pred.float(), target.float(), reduction="none").flatten(1).mean(1)
    return error / MSE_TIMESTEPS


def fixed_noise(like: torch.Tensor, seed: int, rows: Sequence[int], k: int) -> torch.Tensor:
    """Noise (B, ...) of (seed, row, k) in the shape, dtype and place of `like` (B, ...): the same for every model."""
    noise = [torch.randn(like.shape[1:], generator=step_generator(seed, row, k)) for row in rows]
    return torch.stack(noise).to(like.device, like.dtype)
