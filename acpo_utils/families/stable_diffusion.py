"""Stable Diffusion 1 and 2: one text encoder, whose embeddings are all that the U-Net is told beside latents and timestep."""

from functools import partial

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from acpo_utils.families.loading import (
    check_channels,
    check_embeddings,
    distilled_unet,
    latent_scheduler,
    limit_tokenizer,
    load_pipeline_parts,
)


PARTS = {
    "tokenizer": CLIPTokenizer,
    "text_encoder": CLIPTextModel,
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
}
distilled = distilled_unet


def load(
    pretrained_model_name_or_path: str,
    revision: str | None,
    variant: str | None,
    weight_dtype: torch.dtype,
    device: str | torch.device,
):
    """(noise_scheduler, tokenizer, text_encoder, vae, unet) of a hub id, a folder or a .safetensors file; frozen, on `device`.

    The VAE is in fp32, since its decode is scored, the others in `weight_dtype`. Every part is loaded from
    safetensors, and strictly. Raises ValueError, in one line, for what is no Stable Diffusion pipeline, or not all of one.
    """
    parts, scheduler_config = load_pipeline_parts(
        StableDiffusionPipeline,
        PARTS,
        pretrained_model_name_or_path,
        revision=revision,
        variant=variant,
        dtypes={"text_encoder": weight_dtype, "vae": torch.float32, "unet": weight_dtype},
        check_configs=_check_configs,
    )
    tokenizer, text_encoder, vae, unet = (parts[name] for name in PARTS)
    limit_tokenizer(tokenizer, text_encoder)
    for model in (text_encoder, vae, unet):
        model.to(device)
    return latent_scheduler(scheduler_config), tokenizer, text_encoder, vae, unet


def _check_configs(source: str, revision: str | None) -> None:
    unet = check_channels(source, revision)
    text_encoder = CLIPTextConfig.from_pretrained(source, revision=revision, subfolder="text_encoder")
    check_embeddings(unet, text_encoder.hidden_size)


@torch.no_grad()
def encode_prompts(batch: dict, text_encoder: CLIPTextModel) -> dict[str, torch.Tensor]:
    """What the U-Net is told of B captions: {"prompt_embeds": (B, tokens, dim)}, of `batch["input_ids"]` (B, tokens), or
    kept in the batch."""
    if "prompt_embeds" in batch:
        return {"prompt_embeds": batch["prompt_embeds"]}
    return {"prompt_embeds": text_encoder(batch["input_ids"], return_dict=False)[0]}


def predict(unet, latents: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
    """The U-Net's prediction (B, 4, h, w) at latents (B, 4, h, w), timesteps (B,) or (), `conditions` of B rows."""
    return unet(latents, timesteps, conditions["prompt_embeds"], return_dict=False)[0]


def predictor(pipeline: StableDiffusionPipeline, prompts: list[str], size: tuple[int, int]) -> partial:
    """(unet, latents, timesteps) -> prediction for `prompts`, as the pipeline itself encodes them, at any size in pixels."""
    prompt_embeds = pipeline.encode_prompt(prompts, pipeline.unet.device, 1, False)[0]  # (B, tokens, dim)
    return partial(predict, conditions={"prompt_embeds": prompt_embeds})


def build_pipeline(unet, vae, text_encoder, tokenizer, noise_scheduler) -> StableDiffusionPipeline:
    """For sampling by DDIM, all of it on the U-Net's device; the VAE in fp32, as the loss decodes with it.

    accelerate's U-Net returns fp32 in mixed precision too, so that these are the latents which the VAE is given.
    """
    return StableDiffusionPipeline(
        vae=vae.to(unet.device),
        text_encoder=text_encoder.to(unet.device),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(noise_scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
