"""Errors of a model's prediction at fixed noise and timesteps: the MSE of the paper's table 1 (eq. 8) on held-out images,
and how far a LoRA has moved the U-Net, the anchor's distance (eq. 7) over the whole range of timesteps.

Two models are asked the same at the same noise.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tqdm.auto import tqdm

from acpo_utils import flow_matching
from acpo_utils.anchor import base_prediction
from acpo_utils.evaluation.set_metrics import read_images
from acpo_utils.families import stable_diffusion
from acpo_utils.families.latents import scale_latents
from acpo_utils.families.loading import denoiser
from acpo_utils.losses import diffusion_target
from acpo_utils.randomness import step_generator


MSE_TIMESTEPS = 10


def batch_denoising_error(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise_scheduler,
    x0: torch.Tensor,
    rows: Sequence[int],
    seed: int,
) -> torch.Tensor:
    """Of each image of a batch the mean squared error of `predict`, over `MSE_TIMESTEPS` timesteps of the whole range.

    They are spread evenly.

    Args:
        predict: (z_t (B, C, h, w), timesteps (B,)) -> prediction (B, C, h, w).
        x0: (B, C, h, w), clean images in [-1, 1], or latents. rows: their B numbers, from which the noise is drawn.
    Returns:
        (B,) error against the scheduler's own target (noise, velocity or sample, or the flow's velocity eps - x0), in
            fp32; lower is better.
    """
    error = torch.zeros(len(x0), device=x0.device)
    for noisy, noise, timesteps in noised(noise_scheduler, x0, rows, seed):
        if isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler):
            target = noise - x0
        else:
            target = diffusion_target(noise_scheduler, x0, noise, timesteps)
        error += squared_distance(predict(noisy, timesteps), target)
    return error / MSE_TIMESTEPS


def noised(
    noise_scheduler, x0: torch.Tensor, rows: Sequence[int], seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`x0` (B, C, h, w) at each of the `MSE_TIMESTEPS` timesteps: z_t and eps of its shape, and t (B,).

    Of a flow-matching scheduler at sigmas spread as evenly, which stand in the place of t.
    """
    total = noise_scheduler.config.num_train_timesteps
    for k in range(MSE_TIMESTEPS):
        noise = fixed_noise(x0, seed, rows, k)  # (B, C, h, w)  eps
        if isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler):
            sigmas = torch.full((len(x0),), (k + 0.5) / MSE_TIMESTEPS, device=x0.device)  # (B,)
            yield flow_matching.add_noise(x0, noise, sigmas), noise, sigmas
        else:
            timesteps = torch.full((len(x0),), int((k + 0.5) * total / MSE_TIMESTEPS), device=x0.device)  # (B,)
            yield noise_scheduler.add_noise(x0, noise, timesteps), noise, timesteps


def squared_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of each of B predictions (B, ...), in fp32: (B,)."""
    return F.mse_loss(first.float(), second.float(), reduction="none").flatten(1).mean(1)


def fixed_noise(like: torch.Tensor, seed: int, rows: Sequence[int], k: int) -> torch.Tensor:
    """Noise (B, ...) of (seed, row, k) in the shape, dtype and place of `like` (B, ...): the same for every model."""
    noise = [torch.randn(like.shape[1:], generator=step_generator(seed, row, k)) for row in rows]
    return torch.stack(noise).to(like.device, like.dtype)


@torch.no_grad()
def unet_denoising_error(
    unet: torch.nn.Module, noise_scheduler, images: torch.Tensor, seed: int = 0, batch_size: int = 16
) -> torch.Tensor:
    """MSE of the paper's table 1 of an unconditional U-Net on tensors, by `batch_denoising_error`.

    Args:
        unet: UNet2DModel, on any device. noise_scheduler: of its training. images: (N, 3, H, W) in [0, 1].
    Returns:
        (N,) errors, in fp32 on the CPU; lower is better.
    """
    device = next(unet.parameters()).device
    predict = partial(_predict_unconditionally, unet)
    errors = []
    for start in range(0, len(images), batch_size):
        x0 = images[start : start + batch_size].to(device) * 2 - 1  # (B, 3, H, W) in [-1, 1]
        rows = range(start, start + len(x0))
        errors.append(batch_denoising_error(predict, noise_scheduler, x0, rows, seed))
    return torch.cat(errors).cpu()


def _predict_unconditionally(unet: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    return unet(noisy, timesteps, return_dict=False)[0]


def _training_scheduler(pipeline) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """What adds the noise of a pipeline's training, whatever it is sampled with."""
    if isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        return pipeline.scheduler
    return DDPMScheduler.from_config(pipeline.scheduler.config)


@torch.no_grad()
def pipeline_denoising_error(
    pipeline,
    files: Sequence[Path],
    prompts: Sequence[str] | None,
    seed: int = 0,
    batch_size: int = 8,
    predictor: Callable[..., Callable] = stable_diffusion.predictor,
) -> torch.Tensor:
    """MSE of the paper's table 1 of a whole pipeline on files, by `batch_denoising_error`.

    Args:
        pipeline: a text-to-image pipeline, or an unconditional one (`prompts` None, no VAE).
        files: N images of R x R pixels, R the model's own resolution. prompts: N strings.
        predictor: as in `prediction_drift`.
    Returns:
        (N,) errors, in fp32 on the CPU; lower is better.
    """
    unet, device = denoiser(pipeline), pipeline.device
    scheduler = _training_scheduler(pipeline)
    errors, rows = [], range(0)
    for images in read_images(files, batch_size):
        rows = range(rows.stop, rows.stop + len(images))
        pixels = (images.to(device).float() / 127.5 - 1).to(unet.dtype)  # (B, 3, R, R) in [-1, 1]
        predict = partial(_predict_unconditionally, unet)
        if prompts is not None:
            texts = list(prompts[rows.start : rows.stop])
            predict = partial(predictor(pipeline, texts, images.shape[-2:]), unet)
            mean_std = pipeline.vae.encode(pixels.to(pipeline.vae.dtype)).latent_dist
            sampled = mean_std.mean + mean_std.std * fixed_noise(mean_std.mean, seed, rows, MSE_TIMESTEPS)
            pixels = scale_latents(sampled, pipeline.vae).to(unet.dtype)  # (B, 4, h, w)  x0
        pixels = pixels[:, : unet.config.in_channels]  # of a model of grey images

        errors.append(batch_denoising_error(predict, scheduler, pixels, rows, seed).cpu())
    return torch.cat(errors)


@torch.no_grad()
def prediction_drift(
    pipeline,
    images: torch.Tensor,
    prompts: Sequence[str],
    seed: int = 0,
    batch_size: int = 16,
    predictor: Callable[..., Callable] = stable_diffusion.predictor,
) -> torch.Tensor:
    """L_anchor (eq. 7) on noised images, a mean over `MSE_TIMESTEPS` timesteps spread evenly over the whole range.

    Args:
        pipeline: a text-to-image pipeline whose U-Net or transformer has a LoRA, switched on.
        images: (N, 3, H, W) in [0, 1], of the size that the pipeline draws; natural are the base model's own samples.
        prompts: N strings. predictor: the family's, (pipeline, prompts, (H, W)) -> (model, latents, timesteps) -> prediction.
    Returns:
        (N,) fp32 on the CPU, in squared units of the prediction, whose variance is about 1, or 2 of a velocity eps - x0;
            0 without a change.
    """
    unet, vae, device = denoiser(pipeline), pipeline.vae, denoiser(pipeline).device
    noise_scheduler = _training_scheduler(pipeline)
    drift = []
    for start in tqdm(range(0, len(images), batch_size), desc="measuring the drift"):
        rows = range(start, min(start + batch_size, len(images)))
        predict = predictor(pipeline, [prompts[row] for row in rows], images.shape[-2:])
        pixels = (images[start : rows.stop] * 2 - 1).to(device, vae.dtype)  # (B, 3, H, W) in [-1, 1]
        latents = scale_latents(vae.encode(pixels).latent_dist.mode(), vae).to(unet.dtype)  # (B, 4, h, w)
        total = torch.zeros(len(rows), device=device)
        for noisy_latents, _, timesteps in noised(noise_scheduler, latents, rows, seed):
            base_pred = base_prediction(unet, noisy_latents, timesteps, predict=predict)  # eps_theta
            model_pred = predict(unet, noisy_latents, timesteps)  # eps_phi
            total += squared_distance(model_pred, base_pred)  # of eq. 7, for each image by itself
        drift.append((total / MSE_TIMESTEPS).cpu())
    return torch.cat(drift)
