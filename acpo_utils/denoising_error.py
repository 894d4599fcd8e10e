"""The MSE of the paper's table 1: L_diff (eq. 8) of held-out images, each at the same noise and timesteps every time."""

from collections.abc import Callable, Iterator, Sequence

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
    error = torch.zeros(len(x0), device=x0.device)
    for noisy, noise, timesteps in noised(noise_scheduler, x0, rows, seed):
        target = diffusion_target(noise_scheduler, x0, noise, timesteps)
        error += squared_distance(predict(noisy, timesteps), target)
    return error / MSE_TIMESTEPS


def noised(
    noise_scheduler, x0: torch.Tensor, rows: Sequence[int], seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`x0` (B, C, h, w) at each of the `MSE_TIMESTEPS` timesteps: z_t and eps of its shape, and t (B,)."""
    total = noise_scheduler.config.num_train_timesteps
    for k in range(MSE_TIMESTEPS):
        timesteps = torch.full((len(x0),), int((k + 0.5) * total / MSE_TIMESTEPS), device=x0.device)  # (B,)
        noise = fixed_noise(x0, seed, rows, k)  # (B, C, h, w)  eps
        yield noise_scheduler.add_noise(x0, noise, timesteps), noise, timesteps


def squared_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of each of B predictions (B, ...), in fp32: (B,)."""
    return F.mse_loss(first.float(), second.float(), reduction="none").flatten(1).mean(1)


def fixed_noise(like: torch.Tensor, seed: int, rows: Sequence[int], k: int) -> torch.Tensor:
    """Noise (B, ...) of (seed, row, k) in the shape, dtype and place of `like` (B, ...): the same for every model."""
    noise = [torch.randn(like.shape[1:], generator=step_generator(seed, row, k)) for row in rows]
    return torch.stack(noise).to(like.device, like.dtype)
