"""Stable Diffusion XL: two text encoders, and a U-Net that is told the size of each picture and where it was cropped."""

from collections.abc import Sequence
from functools import partial

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from acpo_utils.families.loading import (
    DTYPE,
    check_channels,
    check_embeddings,
    distilled_unet,
    latent_scheduler,
    limit_tokenizer,
    load_pipeline_parts,
)
from acpo_utils.files import load_strictly, one_line


TINY_VAE = "madebyollin/taesdxl"
PARTS = {
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": CLIPTokenizer,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
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
    pretrained_vae_model_name_or_path: str | None = None,
):
    """(noise_scheduler, tokenizers, text_encoders, vae, unet, force_zeros_for_empty_prompt) of a hub id, a folder or a
    .safetensors file; frozen, on `device`.

    The VAE is in fp32, in which it cannot overflow (`force_upcast`), the others in `weight_dtype`. The two tokenizers are a
    list, the two text encoders a ModuleList. The last one, a bool, is the pipeline's setting of that name, which a folder of
    parts or a single file does not state: as of SDXL itself it is True then. Every part is loaded from safetensors, and
    strictly. Raises ValueError, in one line, for what is no Stable Diffusion XL pipeline, or not all of one.
    """
    parts, scheduler_config = load_pipeline_parts(
        StableDiffusionXLPipeline,
        PARTS,
        pretrained_model_name_or_path,
        revision=revision,
        variant=variant,
        dtypes={
            "text_encoder": weight_dtype,
            "text_encoder_2": weight_dtype,
            "vae": torch.float32,
            "unet": weight_dtype,
        },
        check_configs=_check_configs,
    )
    tokenizers = [parts["tokenizer"], parts["tokenizer_2"]]
    text_encoders = torch.nn.ModuleList([parts["text_encoder"], parts["text_encoder_2"]])
    for tokenizer, text_encoder in zip(tokenizers, text_encoders):
        limit_tokenizer(tokenizer, text_encoder)
    vae = parts["vae"]
    if pretrained_vae_model_name_or_path:
        vae = load_vae(pretrained_vae_model_name_or_path, vae)
    for model in (text_encoders, vae, parts["unet"]):
        model.to(device)
    force_zeros = _force_zeros_for_empty_prompt(str(pretrained_model_name_or_path), revision)
    return latent_scheduler(scheduler_config), tokenizers, text_encoders, vae, parts["unet"], force_zeros


def _force_zeros_for_empty_prompt(source: str, revision: str | None) -> bool:
    if source.endswith(".safetensors"):
        return True
    try:
        return StableDiffusionXLPipeline.load_config(source, revision=revision)["force_zeros_for_empty_prompt"]
    except (OSError, KeyError):
        return True


def load_vae(pretrained_vae_model_name_or_path: str, vae: AutoencoderKL) -> AutoencoderKL:
    """Another AutoencoderKL of the same latents, such as madebyollin/sdxl-vae-fp16-fix, in fp32 and frozen.

    Raises ValueError, in one line, for what is none, or has latents of another size than those of `vae`.
    """
    source = pretrained_vae_model_name_or_path
    try:
        other = load_strictly(AutoencoderKL.from_pretrained, source, **{DTYPE: torch.float32})
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--pretrained_vae_model_name_or_path: expected an AutoencoderKL (hub id or folder), {source!r} could not be "
            f"loaded: {one_line(error)[:400]}"
        ) from error
    expected, found = ((v.config.latent_channels, len(v.config.block_out_channels)) for v in (vae, other))
    if expected != found:
        raise ValueError(
            f"--pretrained_vae_model_name_or_path: expected {expected[0]} latent channels and {expected[1]} levels as the "
            f"pipeline's VAE has, found {found[0]} and {found[1]}"
        )
    return other.requires_grad_(False)


def _check_configs(source: str, revision: str | None) -> None:
    unet = check_channels(source, revision)
    encoders = [
        CLIPTextConfig.from_pretrained(source, revision=revision, subfolder=name)
        for name in ("text_encoder", "text_encoder_2")
    ]
    check_embeddings(unet, sum(encoder.hidden_size for encoder in encoders))
    if AutoencoderKL.load_config(source, revision=revision, subfolder="vae").get("latents_mean"):
        raise ValueError("its VAE has a mean of its own for latents, as Playground v2.5's, which is not done here.")


@torch.no_grad()
def encode_prompts(batch: dict, text_encoders: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """What the U-Net is told of B captions, of `batch["input_ids"]` and `batch["input_ids_2"]` (B, tokens), or kept in the
    batch; with `batch["time_ids"]` (B, 6), if they are there.

    As in the pipeline: the last but one layers of both encoders side by side, "prompt_embeds" (B, tokens, 2048), and what
    the second makes of the whole caption, "pooled_prompt_embeds" (B, 1280).
    """
    if "prompt_embeds" in batch:
        names = ("prompt_embeds", "pooled_prompt_embeds", "time_ids")
        return {name: batch[name] for name in names if name in batch}
    first, second = (
        text_encoder(batch[name], output_hidden_states=True)
        for text_encoder, name in zip(text_encoders, ("input_ids", "input_ids_2"))
    )
    conditions = {
        "prompt_embeds": torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1),
        "pooled_prompt_embeds": second.text_embeds,
    }
    return conditions | ({"time_ids": batch["time_ids"]} if "time_ids" in batch else {})


def time_ids(
    original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """{"time_ids": (6,)} of a picture of `original_size`, which was scaled and then cropped to `target_size` at
    `crop_top_left`, of the mirrored picture if it was mirrored; heights first (Podell et al. 2023, section 2.2)."""
    return {"time_ids": torch.tensor([*original_size, *crop_top_left, *target_size], dtype=torch.float32)}


def as_sampled(conditions: dict[str, torch.Tensor], size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """`conditions` of B captions, with the time_ids that the pipeline has for pictures of `size` = (height, width)."""
    embeds = conditions["prompt_embeds"]
    return conditions | {"time_ids": time_ids(size, (0, 0), size)["time_ids"].to(embeds.device).expand(len(embeds), 6)}


def negative_conditions(conditions: dict[str, torch.Tensor], force_zeros_for_empty_prompt: bool) -> dict:
    """Of no prompt, by the `encode_prompts` of the empty one: zeros in its place where the pipeline has them."""
    if not force_zeros_for_empty_prompt:
        return conditions
    return {name: torch.zeros_like(value) for name, value in conditions.items()}


def predict(unet, latents: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
    """The U-Net's prediction (B, 4, h, w) at latents (B, 4, h, w), timesteps (B,) or (), `conditions` of B rows."""
    added = {"text_embeds": conditions["pooled_prompt_embeds"], "time_ids": conditions["time_ids"]}
    return unet(latents, timesteps, conditions["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]


def predictor(pipeline: StableDiffusionXLPipeline, prompts: list[str], size: tuple[int, int]) -> partial:
    """(unet, latents, timesteps) -> prediction for `prompts` at `size` = (height, width), told what the pipeline tells."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, device=pipeline.unet.device, do_classifier_free_guidance=False
    )
    conditions = as_sampled({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, size)
    return partial(predict, conditions=conditions)


def build_pipeline(
    unet, vae, text_encoders, tokenizers, noise_scheduler, force_zeros_for_empty_prompt: bool
) -> StableDiffusionXLPipeline:
    """For sampling by DDIM, all of it on the U-Net's device, without a watermark; the VAE in fp32, as the loss decodes
    with it."""
    text_encoder, text_encoder_2 = text_encoders.to(unet.device)
    return StableDiffusionXLPipeline(
        vae=vae.to(unet.device),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=DDIMScheduler.from_config(noise_scheduler.config),
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        add_watermarker=False,
    )
