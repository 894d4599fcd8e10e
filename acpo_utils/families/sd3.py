"""Stable Diffusion 3 and 3.5: a transformer that predicts a velocity, two CLIP text encoders, and T5 where there is one."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from acpo_utils.families.loading import distilled_by_words, limit_tokenizer, load_pipeline_parts, refuse_single_file


TINY_VAE = "madebyollin/taesd3"
TARGETS = "attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,attn.add_q_proj,attn.add_k_proj,attn.add_v_proj,attn.to_add_out"
PARTS = {
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": CLIPTokenizer,
    "tokenizer_3": T5TokenizerFast,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
    "vae": AutoencoderKL,
    "transformer": SD3Transformer2DModel,
}
T5_PARTS = ("tokenizer_3", "text_encoder_3")


class NoT5(torch.nn.Module):
    """What the pipeline has in place of T5's embeddings where there is no T5: zeros."""

    def __init__(self, num_tokens: int, dim: int, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(num_tokens, dim, dtype=dtype))

    def forward(self, batch_size: int) -> torch.Tensor:
        return self.embeddings.expand(batch_size, -1, -1)


def load(
    pretrained_model_name_or_path: str,
    revision: str | None,
    variant: str | None,
    weight_dtype: torch.dtype,
    device: str | torch.device,
    max_sequence_length: int = 256,
    quantization_config_path: str | None = None,
):
    """(noise_scheduler, tokenizers, text_encoders, vae, transformer) of a hub id or a folder; frozen, on `device`.

    The VAE is in fp32, since its decode is scored, the others in `weight_dtype`, the transformer quantised if a file
    says how. Three tokenizers are a list, three text encoders a ModuleList; of a pipeline without T5 there are two
    tokenizers, and `NoT5` is the third encoder. `max_sequence_length` is T5's, in tokens. Every part is loaded from
    safetensors, and strictly. Raises ValueError, in one line, for what is no Stable Diffusion 3 pipeline, or not all
    of one.
    """
    source = str(pretrained_model_name_or_path)
    refuse_single_file(StableDiffusion3Pipeline, source)
    with_t5 = has_t5(source, revision)
    classes = {name: part_class for name, part_class in PARTS.items() if with_t5 or name not in T5_PARTS}
    dtypes = {name: weight_dtype for name in classes if not name.startswith("tokenizer")}
    parts, scheduler_config = load_pipeline_parts(
        StableDiffusion3Pipeline,
        classes,
        source,
        revision=revision,
        variant=variant,
        dtypes=dtypes | {"vae": torch.float32},
        check_configs=_check_configs,
        quantization_config_path=quantization_config_path,
    )
    vae, transformer = parts["vae"], parts["transformer"]
    tokenizers = [parts["tokenizer"], parts["tokenizer_2"]]
    text_encoders = torch.nn.ModuleList([parts["text_encoder"], parts["text_encoder_2"]])
    for tokenizer, text_encoder in zip(tokenizers, text_encoders):
        limit_tokenizer(tokenizer, text_encoder)
    tokenizers[1].model_max_length = tokenizers[0].model_max_length  # as the pipeline calls it
    if with_t5:
        parts["tokenizer_3"].model_max_length = max_sequence_length
        tokenizers.append(parts["tokenizer_3"])
        text_encoders.append(parts["text_encoder_3"])
    else:
        text_encoders.append(NoT5(max_sequence_length, transformer.config.joint_attention_dim, weight_dtype))
    for model in (text_encoders, vae, transformer):
        model.to(device)
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    return noise_scheduler, tokenizers, text_encoders, vae, transformer


def has_t5(source: str, revision: str | None) -> bool:
    """Whether the pipeline's model_index.json names a third text encoder, or its folder of parts has one."""
    try:
        index = StableDiffusion3Pipeline.load_config(source, revision=revision)
    except OSError:
        return not Path(source).is_dir() or Path(source, "text_encoder_3").is_dir()
    return index.get("text_encoder_3", [None])[0] is not None


def _check_configs(source: str, revision: str | None) -> None:
    transformer = SD3Transformer2DModel.load_config(source, revision=revision, subfolder="transformer")
    vae = AutoencoderKL.load_config(source, revision=revision, subfolder="vae")
    if transformer["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"its transformer takes {transformer['in_channels']} channels where its VAE has {vae['latent_channels']}."
        )
    widths = [
        CLIPTextConfig.from_pretrained(source, revision=revision, subfolder=name).projection_dim
        for name in ("text_encoder", "text_encoder_2")
    ]
    if transformer["pooled_projection_dim"] != sum(widths):
        raise ValueError(
            f"its transformer takes pooled embeddings of {transformer['pooled_projection_dim']} numbers, and its text "
            f"encoders give {widths[0]} and {widths[1]}."
        )


@torch.no_grad()
def encode_prompts(batch: dict, text_encoders: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """What the transformer is told of B captions, of `batch["input_ids"]`, `"input_ids_2"` and, with T5, `"input_ids_3"`
    (B, tokens), or kept in the batch.

    As in the pipeline: the last but one layers of both CLIPs side by side, filled up with zeros to T5's width, then T5's
    tokens, "prompt_embeds" (B, 77 + max_sequence_length, 4096); and what both CLIPs make of the whole caption,
    "pooled_prompt_embeds" (B, 2048).
    """
    if "prompt_embeds" in batch:
        return {name: batch[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    first, second = (
        text_encoder(batch[name], output_hidden_states=True)
        for text_encoder, name in zip(text_encoders, ("input_ids", "input_ids_2"))
    )
    clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    t5 = text_encoders[2](batch["input_ids_3"])[0] if "input_ids_3" in batch else text_encoders[2](len(clip))
    clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return {
        "prompt_embeds": torch.cat([clip, t5], dim=1),
        "pooled_prompt_embeds": torch.cat([first.text_embeds, second.text_embeds], dim=-1),
    }


def predict(
    transformer, latents: torch.Tensor, sigmas: torch.Tensor, conditions: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The transformer's velocity (B, 16, h, w) at latents (B, 16, h, w), sigmas (B,), `conditions` of B rows."""
    return transformer(
        latents,
        timestep=1000 * sigmas,
        encoder_hidden_states=conditions["prompt_embeds"],
        pooled_projections=conditions["pooled_prompt_embeds"],
        return_dict=False,
    )[0]


def schedule(noise_scheduler, latents_shape: Sequence[int], num_inference_steps: int) -> torch.Tensor:
    """The pipeline's sigmas (steps + 1,) of sampling latents (B, C, h, w), from 1 down to 0; `noise_scheduler` stays as it is."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config)
    shift = {}
    if scheduler.config.use_dynamic_shifting:
        height, width = latents_shape[-2:]
        config = scheduler.config
        mu = calculate_shift(
            (height // 2) * (width // 2),  # a token is a patch of 2 x 2 latents
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
        shift = {"mu": mu}
    scheduler.set_timesteps(num_inference_steps, **shift)
    return scheduler.sigmas


def distilled(pretrained_model_name_or_path: str, revision: str | None) -> str | None:
    """What says that a model was distilled to few steps: the scheduler it was saved with, its name or its card; None if
    nothing does."""
    config = FlowMatchEulerDiscreteScheduler.load_config(
        pretrained_model_name_or_path, revision=revision, subfolder="scheduler"
    )
    if config["_class_name"] == "FlowMatchLCMScheduler":
        return "its scheduler is a FlowMatchLCMScheduler"
    return distilled_by_words(pretrained_model_name_or_path, revision)


def predictor(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], size: tuple[int, int], max_sequence_length: int = 256
) -> partial:
    """(transformer, latents, sigmas) -> velocity for `prompts`, as the pipeline itself encodes them, at any size in pixels."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts,
        None,
        None,
        device=pipeline.transformer.device,
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
    )
    return partial(predict, conditions={"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})


def build_pipeline(transformer, vae, text_encoders, tokenizers, noise_scheduler) -> StableDiffusion3Pipeline:
    """For sampling by Euler steps, all of it on the transformer's device; the VAE in fp32, as the loss decodes with it."""
    first, second, third = text_encoders.to(transformer.device)
    with_t5 = not isinstance(third, NoT5)
    return StableDiffusion3Pipeline(
        vae=vae.to(transformer.device),
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=third if with_t5 else None,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=tokenizers[2] if with_t5 else None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config),
    )
