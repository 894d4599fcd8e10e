"""Z-Image: a transformer that predicts a velocity with the other sign on the other clock, told of captions of any length."""

from collections.abc import Sequence
from functools import partial

import torch
from accelerate.utils import compare_versions
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from acpo_utils.families.chat import ChatTokenizer, read_ids
from acpo_utils.families.loading import (
    distilled_by_words,
    limit_tokenizer,
    load_pipeline_parts,
    refuse_single_file,
)


TINY_VAE = "madebyollin/taef1"  # the VAE is FLUX.1's
TARGETS = "to_k,to_q,to_v,to_out.0"
PARTS = {
    "tokenizer": Qwen2Tokenizer,
    "text_encoder": Qwen3Model,
    "vae": AutoencoderKL,
    "transformer": ZImageTransformer2DModel,
}
TURBO_SHIFT = 3.0  # of Z-Image-Turbo's scheduler; Z-Image's is 6
# Before, the pipeline's last step is one from sigma = 0 to 0, which moves nothing.
STEPS_ARE_STEPS = compare_versions("diffusers", ">=", "0.39.0")


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
    says how. `tokenizers` is a list of one `ChatTokenizer`, `text_encoders` a ModuleList of one. `max_sequence_length`
    is a caption's, in tokens. Every part is loaded from safetensors, and strictly. Raises ValueError, in one line, for
    what is no Z-Image pipeline, or not all of one.
    """
    refuse_single_file(ZImagePipeline, str(pretrained_model_name_or_path))
    dtypes = {name: weight_dtype for name in PARTS if name != "tokenizer"}
    parts, scheduler_config = load_pipeline_parts(
        ZImagePipeline,
        PARTS,
        pretrained_model_name_or_path,
        revision=revision,
        variant=variant,
        dtypes=dtypes | {"vae": torch.float32},
        check_configs=_check_configs,
        quantization_config_path=quantization_config_path,
    )
    limit_tokenizer(parts["tokenizer"], parts["text_encoder"])
    tokenizers = [ChatTokenizer(parts["tokenizer"], max_sequence_length, enable_thinking=True)]
    text_encoders = torch.nn.ModuleList([parts["text_encoder"]])
    for model in (text_encoders, parts["vae"], parts["transformer"]):
        model.to(device)
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    return noise_scheduler, tokenizers, text_encoders, parts["vae"], parts["transformer"]


def _check_configs(source: str, revision: str | None) -> None:
    transformer = ZImageTransformer2DModel.load_config(source, revision=revision, subfolder="transformer")
    vae = AutoencoderKL.load_config(source, revision=revision, subfolder="vae")
    if transformer.get("siglip_feat_dim"):
        raise ValueError(
            "its transformer looks at pictures as well (siglip_feat_dim), for which there is no script here."
        )
    if transformer["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"its transformer takes {transformer['in_channels']} channels where its VAE has {vae['latent_channels']}."
        )
    width = Qwen3Config.from_pretrained(source, revision=revision, subfolder="text_encoder").hidden_size
    if transformer["cap_feat_dim"] != width:
        raise ValueError(
            f"its transformer takes embeddings of {transformer['cap_feat_dim']} numbers, and its text encoder gives {width}."
        )


@torch.no_grad()
def encode_prompts(batch: dict, text_encoders: Sequence[torch.nn.Module]) -> dict[str, list[torch.Tensor]]:
    """What the transformer is told of B captions, of `batch["input_ids"]` (B, tokens), or kept in the batch.

    As in the pipeline: what the last but one layer says of each caption's own tokens, no padding, "prompt_embeds", a list of B
    tensors (tokens, 2560). Kept, they may be a tensor (B, tokens, 2560) if all are as long.
    """
    if "prompt_embeds" in batch:
        return {"prompt_embeds": list(batch["prompt_embeds"])}
    input_ids, is_token = read_ids(batch["input_ids"])
    states = text_encoders[0](
        input_ids=input_ids,
        attention_mask=is_token,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states[-2]
    return {"prompt_embeds": [tokens[own] for tokens, own in zip(states, is_token)]}


def without_prompt(conditions: dict, negative_conditions: dict) -> dict[str, list[torch.Tensor]]:
    """`negative_conditions`, of one caption, for each of `conditions`: what guidance leads away from."""
    (negative,) = negative_conditions["prompt_embeds"]
    return {"prompt_embeds": [negative] * len(conditions["prompt_embeds"])}


def longest_conditions(conditions: dict, num_tokens: int) -> dict[str, torch.Tensor]:
    """In place of `conditions` those of a caption of so many tokens, zeros (1, tokens, dim): for the estimate of memory."""
    (embeds,) = conditions["prompt_embeds"]
    return {"prompt_embeds": embeds.new_zeros(1, num_tokens, embeds.shape[-1])}


def _clock(sigmas: torch.Tensor) -> torch.Tensor:
    """1 - sigma, rounded as the pipeline rounds it."""
    return (1000 - 1000 * sigmas) / 1000


def predict(transformer, latents: torch.Tensor, sigmas: torch.Tensor, conditions: dict) -> torch.Tensor:
    """The velocity eps - x0 (B, 16, h, w) at latents (B, 16, h, w), sigmas (B,), `conditions` of B captions.

    The transformer is told 1 - sigma, and says x0 - eps. It takes and gives pictures one by one, with an axis for frames.
    """
    pictures = list(latents.unsqueeze(2).unbind())  # B times (16, 1, h, w)
    velocities = transformer(pictures, _clock(sigmas), conditions["prompt_embeds"], return_dict=False)[0]
    return -torch.stack(velocities).squeeze(2)


def guided(
    pred: torch.Tensor,
    negative_pred: torch.Tensor,
    sigmas: torch.Tensor,
    guidance_scale: float,
    cfg_normalization: float = 0.0,
    cfg_truncation: float = 1.0,
) -> torch.Tensor:
    """The pipeline's classifier-free guidance, v + scale (v - v_negative): (B, ...) in fp32. A scale of 0 is none of it.

    Args:
        pred, negative_pred: (B, ...) velocities with the prompt and without. sigmas: (B,).
        cfg_normalization: at most so many times as long as `pred` the guided velocity may be; 0: as long as it is.
        cfg_truncation: no guidance at 1 - sigma above it.
    """
    pred, negative_pred = pred.float(), negative_pred.float()
    guided_pred = pred + guidance_scale * (pred - negative_pred)
    if cfg_normalization:
        norms = [torch.linalg.vector_norm(v.flatten(1), dim=1) for v in (pred, guided_pred)]  # (B,) each
        shares = (cfg_normalization * norms[0] / norms[1]).clamp(max=1)
        guided_pred = guided_pred * shares.view(-1, *[1] * (pred.ndim - 1))
    truncated = _clock(sigmas) > cfg_truncation
    return torch.where(truncated.view(-1, *[1] * (pred.ndim - 1)), pred, guided_pred)


def schedule(noise_scheduler, latents_shape: Sequence[int], num_inference_steps: int) -> torch.Tensor:
    """The pipeline's sigmas (steps + 1,) of sampling latents (B, C, h, w), from 1 down to 0; `noise_scheduler` stays as it is.

    diffusers before 0.39 takes one step less than it is told (`STEPS_ARE_STEPS`), and so does this: (steps,).
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config)
    height, width = latents_shape[-2:]
    config = scheduler.config
    mu = calculate_shift(  # which a fixed shift, that of both models, makes no use of
        (height // 2) * (width // 2),  # a token is a patch of 2 x 2 latents
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    steps = num_inference_steps if STEPS_ARE_STEPS else max(num_inference_steps - 1, 1)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    return scheduler.sigmas


def distilled(pretrained_model_name_or_path: str, revision: str | None) -> str | None:
    """What says that a model was distilled to few steps, as Z-Image-Turbo: its name, its card, or the scheduler it was saved
    with; None if nothing does."""
    if by_words := distilled_by_words(pretrained_model_name_or_path, revision):
        return by_words
    config = FlowMatchEulerDiscreteScheduler.load_config(
        pretrained_model_name_or_path, revision=revision, subfolder="scheduler"
    )
    if config["_class_name"] == "FlowMatchLCMScheduler":
        return "its scheduler is a FlowMatchLCMScheduler"
    turbo = not config.get("use_dynamic_shifting") and config.get("shift") == TURBO_SHIFT
    return f"its scheduler's shift is {TURBO_SHIFT:g}, Z-Image-Turbo's" if turbo else None


def predictor(
    pipeline: ZImagePipeline, prompts: list[str], size: tuple[int, int], max_sequence_length: int = 512
) -> partial:
    """(transformer, latents, sigmas) -> velocity for `prompts`, as the pipeline itself encodes them, at any size in pixels."""
    embeds, _ = pipeline.encode_prompt(
        list(prompts),  # which the pipeline writes into
        device=pipeline.transformer.device,
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
    )
    return partial(predict, conditions={"prompt_embeds": embeds})


def build_pipeline(transformer, vae, text_encoders, tokenizers, noise_scheduler) -> ZImagePipeline:
    """For sampling by Euler steps, all of it on the transformer's device; the VAE in fp32, as the loss decodes with it."""
    (text_encoder,) = text_encoders.to(transformer.device)
    return ZImagePipeline(
        vae=vae.to(transformer.device),
        text_encoder=text_encoder,
        tokenizer=tokenizers[0].tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config),
    )
