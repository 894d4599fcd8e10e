"""How far a LoRA has moved the U-Net: the anchor's distance (eq. 7), over the whole range of timesteps."""

from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler
from tqdm.auto import tqdm

from acpo_utils.anchor import base_prediction
from acpo_utils.denoising_error import MSE_TIMESTEPS, noised, squared_distance


@torch.no_grad()
def prediction_drift(
    pipeline, images: torch.Tensor, prompts: Sequence[str], seed: int = 0, batch_size: int = 16
) -> torch.Tensor:
    """L_anchor (eq. 7) on noised images, a mean over `MSE_TIMESTEPS` timesteps spread evenly over the whole range.

    Args:
        pipeline: a Stable Diffusion pipeline whose U-Net has a LoRA, switched on.
        images: (N, 3, H, W) in [0, 1], of the size that the pipeline draws; natural are the base model's own samples.
        prompts: N strings.
    Returns:
        (N,) fp32 on the CPU, in squared units of the prediction, whose variance is about 1; 0 without a change.
    """
    unet, vae, device = pipeline.unet, pipeline.vae, pipeline.unet.device
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)  # whatever it is sampled with
    drift = []
    for start in tqdm(range(0, len(images), batch_size), desc="measuring the drift"):
        rows = range(start, min(start + batch_size, len(images)))
        prompt_embeds = pipeline.encode_prompt([prompts[row] for row in rows], device, 1, False)[0]  # (B, tokens, dim)
        pixels = (images[start : rows.stop] * 2 - 1).to(device, vae.dtype)  # (B, 3, H, W) in [-1, 1]
        latents = (vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor).to(unet.dtype)  # (B, 4, h, w)
        total = torch.zeros(len(rows), device=device)
        for noisy_latents, _, timesteps in noised(noise_scheduler, latents, rows, seed):
            base_pred = base_prediction(unet, noisy_latents, timesteps, prompt_embeds)  # eps_theta
            model_pred = unet(noisy_latents, timesteps, prompt_embeds, return_dict=False)[0]  # eps_phi
            total += squared_distance(model_pred, base_pred)  # of eq. 7, for each image by itself
        drift.append((total / MSE_TIMESTEPS).cpu())
    return torch.cat(drift)
