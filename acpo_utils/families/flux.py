"""FLUX.1: a transformer that predicts a velocity and is told the guidance scale, one CLIP text encoder and T5."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from acpo_utils.families.loading import distilled_by_words, limit_tokenizer, load_pipeline_parts, refuse_single_file


TINY_VAE = "madebyollin/taef1"
TARGETS = "attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,attn.add_q_proj,attn.add_k_proj,attn.add_v_proj,attn.to_add_out"
PARTS = {
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": T5TokenizerFast,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
    "vae": AutoencoderKL,
    "transformer": FluxTransformer2DModel,
}


def load(
    pretrained_model_name_or_path: str,
    revision: str | None,
    variant: str | None,
    weight_dtype: torch.dtype,
    device: str | torch.device,
    max_sequence_length: int = 512,
    quantization_config_path: str | None = None,
):
    """(noise_scheduler, tokenizers, text_encoders, vae, transformer) of a hub id or a folder; frozen, on `device`.

    The VAE is in fp32, since its decode is scored, the others in `weight_dtype`, the transformer quantised if a file
    says how. The two tokenizers are a list, the two text encoders a ModuleList. `max_sequence_length` is T5's, in
    tokens. Every part is loaded from safetensors, and strictly. Raises ValueError, in one line, for what is no FLUX.1
    pipeline, or not all of one.
    """
    refuse_single_file(FluxPipeline, str(pretrained_model_name_or_path))
    dtypes = {name: weight_dtype for name in PARTS if not name.startswith("tokenizer")}
    parts, scheduler_config = load_pipeline_parts(
        FluxPipeline,
        PARTS,
        pretrained_model_name_or_path,
        revision=revision,
        variant=variant,
        dtypes=dtypes | {"vae": torch.float32},
        check_configs=_check_configs,
        quantization_config_path=quantization_config_path,
    )
    limit_tokenizer(parts["tokenizer"], parts["text_encoder"])
    parts["tokenizer_2"].model_max_length = max_sequence_length
    tokenizers = [parts["tokenizer"], parts["tokenizer_2"]]
    text_encoders = torch.nn.ModuleList([parts["text_encoder"], parts["text_encoder_2"]])
    for model in (text_encoders, parts["vae"], parts["transformer"]):
        model.to(device)
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    return noise_scheduler, tokenizers, text_encoders, parts["vae"], parts["transformer"]


def _check_configs(source: str, revision: str | None) -> None:
    transformer = FluxTransformer2DModel.load_config(source, revision=revision, subfolder="transformer")
    vae = AutoencoderKL.load_config(source, revision=revision, subfolder="vae")
    if transformer["in_channels"] != 4 * vae["latent_channels"]:
        raise ValueError(
            f"its transformer takes {transformer['in_channels']} channels where 2 x 2 latents of its VAE have "
            f"{4 * vae['latent_channels']}: a Fill, Depth or another image-conditioned model, for which there is no script here."
        )
    widths = (
        CLIPTextConfig.from_pretrained(source, revision=revision, subfolder="text_encoder").hidden_size,
        T5Config.from_pretrained(source, revision=revision, subfolder="text_encoder_2").d_model,
    )
    expected = (transformer["pooled_projection_dim"], transformer["joint_attention_dim"])
    if expected != widths:
        raise ValueError(
            f"its transformer takes embeddings of {expected[0]} and {expected[1]} numbers, and its text encoders give "
            f"{widths[0]} and {widths[1]}."
        )


@torch.no_grad()
def encode_prompts(batch: dict, text_encoders: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """What the transformer is told of B captions, of `batch["input_ids"]` and `"input_ids_2"` (B, tokens), or kept in the batch.

    As in the pipeline: T5's tokens, "prompt_embeds" (B, max_sequence_length, 4096), and what CLIP makes of the whole caption,
    "pooled_prompt_embeds" (B, 768).
    """
    if "prompt_embeds" in batch:
        return {name: batch[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    return {
        "prompt_embeds": text_encoders[1](batch["input_ids_2"])[0],
        "pooled_prompt_embeds": text_encoders[0](batch["input_ids"]).pooler_output,
    }


def with_guidance(conditions: dict[str, torch.Tensor], guidance_scale: float) -> dict[str, torch.Tensor]:
    """`conditions` of B captions, with the guidance scale that the transformer is told as a number, "guidance" (B,)."""
    embeds = conditions["prompt_embeds"]
    return conditions | {"guidance": torch.full((len(embeds),), guidance_scale, device=embeds.device)}


def predict(
    transformer, latents: torch.Tensor, sigmas: torch.Tensor, conditions: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The transformer's velocity (B, 16, h, w) at latents (B, 16, h, w), sigmas (B,), `conditions` of B rows, which
    `with_guidance` gave a scale; a model without such an input (FLUX.1-schnell) is told none."""
    batch_size, channels, height, width = latents.shape
    ids = FluxPipeline._prepare_latent_image_ids(
        batch_size, height // 2, width // 2, latents.device, torch.float32
    )  # (h w / 4, 3)
    embeds = conditions["prompt_embeds"]
    takes_guidance = extract_model_from_parallel(transformer).config.guidance_embeds
    velocity = transformer(
        FluxPipeline._pack_latents(latents, batch_size, channels, height, width),  # (B, h w / 4, 4 * 16)
        timestep=sigmas,
        guidance=conditions["guidance"] if takes_guidance else None,
        encoder_hidden_states=embeds,
        pooled_projections=conditions["pooled_prompt_embeds"],
        txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device),
        img_ids=ids,
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(velocity, height, width, 1)  # a factor of 1: height and width are of latents


def schedule(noise_scheduler, latents_shape: Sequence[int], num_inference_steps: int) -> torch.Tensor:
    """The pipeline's sigmas (steps + 1,) of sampling latents (B, C, h, w), from 1 down to 0; `noise_scheduler` stays as it is."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config)
    height, width = latents_shape[-2:]
    mu = calculate_shift(
        (height // 2) * (width // 2),  # a token is a patch of 2 x 2 latents
        scheduler.config.base_image_seq_len,
        scheduler.config.max_image_seq_len,
        scheduler.config.base_shift,
        scheduler.config.max_shift,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), mu=mu)
    return scheduler.sigmas


def distilled(pretrained_model_name_or_path: str, revision: str | None, noise_scheduler) -> str | None:
    """What says that a model was distilled to few steps: its name, its card, or a schedule that does not depend on the size,
    as FLUX.1-schnell's; None if nothing does."""
    if by_words := distilled_by_words(pretrained_model_name_or_path, revision):
        return by_words
    return None if noise_scheduler.config.use_dynamic_shifting else "its scheduler has no dynamic shift"


def predictor(
    pipeline: FluxPipeline,
    prompts: list[str],
    size: tuple[int, int],
    guidance_scale: float = 3.5,
    max_sequence_length: int = 512,
) -> partial:
    """(transformer, latents, sigmas) -> velocity for `prompts`, as the pipeline itself encodes them, at any size in pixels."""
    embeds, pooled, _ = pipeline.encode_prompt(
        prompts, device=pipeline.transformer.device, max_sequence_length=max_sequence_length
    )
    conditions = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    return partial(predict, conditions=with_guidance(conditions, guidance_scale))


def build_pipeline(transformer, vae, text_encoders, tokenizers, noise_scheduler) -> FluxPipeline:
    """For sampling by Euler steps, all of it on the transformer's device; the VAE in fp32, as the loss decodes with it."""
    first, second = text_encoders.to(transformer.device)
    return FluxPipeline(
        vae=vae.to(transformer.device),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config),
    )
