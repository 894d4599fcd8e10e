"""The four losses of the ACPO paper (section 3.3, eqs. 6 to 9), and which steps they train, as plain functions."""

from typing import TypeAlias

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr


NoiseScheduler: TypeAlias = DDPMScheduler | DDIMScheduler  # what has `add_noise`, `get_velocity` and `alphas_cumprod`


def diffusion_target(
    noise_scheduler: NoiseScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the model is trained to predict, by the scheduler's `prediction_type`: noise, velocity or sample.

    Args:
        latents: (B, ...) clean latents x0. noise: (B, ...) the noise added to them. timesteps: (B,) integers.
    Raises:
        ValueError: for a prediction type other than "epsilon", "v_prediction" and "sample".
    """
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    if prediction_type == "sample":
        return latents
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, the scheduler has {prediction_type!r}")


def diffusion_loss(
    noise_scheduler: NoiseScheduler,
    model_pred: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """L_diff = E ||eps - eps_phi(z_t, t, c)||^2, the ordinary denoising loss (ACPO eq. 8). Returns a scalar.

    Computed in fp32 as the mean over elements, against `diffusion_target`. `snr_gamma` switches on min-SNR weighting
    (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"), as in the diffusers examples.
    """
    target = diffusion_target(noise_scheduler, latents, noise, timesteps)
    if snr_gamma is None:
        return F.mse_loss(model_pred.float(), target.float())
    snr = compute_snr(noise_scheduler, timesteps)  # (B,)
    weights = snr.clamp(max=snr_gamma)
    if noise_scheduler.config.prediction_type == "epsilon":
        weights = weights / snr
    elif noise_scheduler.config.prediction_type == "v_prediction":
        weights = weights / (snr + 1)
    per_sample = F.mse_loss(model_pred.float(), target.float(), reduction="none").flatten(1).mean(1)  # (B,)
    return (weights * per_sample).mean()


def anchor_loss(model_pred: torch.Tensor, base_pred: torch.Tensor) -> torch.Tensor:
    """L_anchor = E_{t < tmax} ||eps_phi(z_t, t, c) - eps_theta(z_t, t, c)||^2 (ACPO eq. 7). Returns a scalar.

    Args:
        model_pred: (B, ...) the trained model's prediction. base_pred: (B, ...) the frozen base model's, without graph.
            Both in the scheduler's own prediction type, whichever it is. Mean over elements, in fp32.
    """
    return F.mse_loss(model_pred.float(), base_pred.detach().float())


def quality_loss(scores: torch.Tensor) -> torch.Tensor:
    """L_quality = mean(1 - Q(x_hat, c)) (ACPO eq. 6). Returns a scalar in (0, 1).

    Args:
        scores: (B,) the frozen evaluator's scores, in (0, 1), higher is better, with graph back to the images.
    """
    return (1 - scores.float()).mean()


def keep_gradients(num_steps: int, backprop_steps: int | None = None) -> list[bool]:
    """Which of the `num_steps` predictions on the way to x_hat (ACPO eq. 5) L_quality trains: the last `backprop_steps`.

    None: all of them. Raises ValueError if num_steps < 1 or backprop_steps is outside 1..num_steps.
    """
    backprop_steps = num_steps if backprop_steps is None else backprop_steps
    if num_steps < 1 or not 1 <= backprop_steps <= num_steps:
        raise ValueError(f"expected 1 <= backprop_steps <= num_steps, got {backprop_steps} and {num_steps}")
    return [step >= num_steps - backprop_steps for step in range(num_steps)]


def acpo_objective(
    loss_diffusion: torch.Tensor | None,
    loss_anchor: torch.Tensor | None,
    loss_quality: torch.Tensor | None,
    diffusion_weight: float = 1.0,
    anchor_weight: float = 1.0,
    quality_weight: float = 0.1,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L = L_diff + lambda_anchor L_anchor + lambda_quality L_quality (ACPO eq. 9).

    A term that was not computed is None and adds nothing. Returns the scalar total, and the terms, unweighted and with
    their graph, by the names under which they are logged: `loss`, `loss_diffusion`, `loss_anchor`, `loss_quality`.

    Raises:
        ValueError: if every term is None.
    """
    weighted = {
        "loss_diffusion": (diffusion_weight, loss_diffusion),
        "loss_anchor": (anchor_weight, loss_anchor),
        "loss_quality": (quality_weight, loss_quality),
    }
    present = {name: (weight, term) for name, (weight, term) in weighted.items() if term is not None}
    if not present:
        raise ValueError("nothing to optimise: the diffusion, the anchor and the quality loss are all switched off")
    first, *others = (weight * term for weight, term in present.values())
    total = sum(others, start=first)
    return total, {"loss": total} | {name: term for name, (_, term) in present.items()}
