"""FLUX.2-klein: a transformer that predicts a velocity, told of layers of a Qwen3; latents in patches, normalised by the VAE."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from acpo_utils.families.chat import ChatTokenizer, read_ids
from acpo_utils.families.loading import (
    distilled_by_words,
    limit_tokenizer,
    load_pipeline_parts,
    refuse_single_file,
)
from acpo_utils.files import load_strictly


SMALL_DECODER = "black-forest-labs/FLUX.2-small-decoder"
TEXT_LAYERS = (9, 18, 27)  # of the pipeline, side by side
PARTS = {
    "tokenizer": Qwen2TokenizerFast,
    "text_encoder": Qwen3ForCausalLM,
    "vae": AutoencoderKLFlux2,
    "transformer": Flux2Transformer2DModel,
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
    """(noise_scheduler, tokenizers, text_encoders, vae, transformer, is_distilled) of a hub id or a folder; frozen, on
    `device`.

    The VAE is in fp32, since its decode is scored, the others in `weight_dtype`, the transformer quantised if a file
    says how. `tokenizers` is a list of one `ChatTokenizer`, `text_encoders` a ModuleList of one. `max_sequence_length`
    is a caption's, in tokens. Every part is loaded from safetensors, and strictly. Raises ValueError, in one line, for
    what is no FLUX.2-klein pipeline, or not all of one.
    """
    refuse_single_file(Flux2KleinPipeline, str(pretrained_model_name_or_path))
    parts, scheduler_config = load_pipeline_parts(
        Flux2KleinPipeline,
        PARTS,
        pretrained_model_name_or_path,
        revision=revision,
        variant=variant,
        dtypes={"text_encoder": weight_dtype, "vae": torch.float32, "transformer": weight_dtype},
        check_configs=_check_configs,
        quantization_config_path=quantization_config_path,
    )
    limit_tokenizer(parts["tokenizer"], parts["text_encoder"])
    tokenizers = [ChatTokenizer(parts["tokenizer"], max_sequence_length, enable_thinking=False)]
    text_encoders = torch.nn.ModuleList([parts["text_encoder"]])
    for model in (text_encoders, parts["vae"], parts["transformer"]):
        model.to(device)
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    quick = is_distilled(pretrained_model_name_or_path, revision)
    return noise_scheduler, tokenizers, text_encoders, parts["vae"], parts["transformer"], quick


def _check_configs(source: str, revision: str | None) -> None:
    transformer = Flux2Transformer2DModel.load_config(source, revision=revision, subfolder="transformer")
    vae = AutoencoderKLFlux2.load_config(source, revision=revision, subfolder="vae")
    if transformer["in_channels"] != 4 * vae["latent_channels"]:
        raise ValueError(
            f"its transformer takes {transformer['in_channels']} channels where 2 x 2 latents of its VAE have "
            f"{4 * vae['latent_channels']}."
        )
    text_encoder = Qwen3Config.from_pretrained(source, revision=revision, subfolder="text_encoder")
    width = len(TEXT_LAYERS) * text_encoder.hidden_size
    if transformer["joint_attention_dim"] != width or text_encoder.num_hidden_layers < TEXT_LAYERS[-1]:
        raise ValueError(
            f"its transformer takes embeddings of {transformer['joint_attention_dim']} numbers, and layers "
            f"{', '.join(map(str, TEXT_LAYERS))} of its text encoder, which has {text_encoder.num_hidden_layers}, give {width}."
        )


@torch.no_grad()
def encode_prompts(batch: dict, text_encoders: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """What the transformer is told of B captions, of `batch["input_ids"]` (B, tokens) of a `ChatTokenizer`, or kept in the
    batch.

    As in the pipeline three layers of Qwen3 side by side, padding too: {"prompt_embeds": (B, tokens, 3 * 2560)}.
    """
    if "prompt_embeds" in batch:
        return {"prompt_embeds": batch["prompt_embeds"]}
    ids, is_token = read_ids(batch["input_ids"])
    encoded = text_encoders[0].base_model(  # without the language model's head, whose words nobody reads
        input_ids=ids,
        attention_mask=is_token.long(),
        output_hidden_states=True,
        use_cache=False,
    )
    return {"prompt_embeds": torch.cat([encoded.hidden_states[n] for n in TEXT_LAYERS], dim=-1)}


def predict(
    transformer, latents: torch.Tensor, sigmas: torch.Tensor, conditions: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The transformer's velocity (B, 128, h, w) at latents (B, 128, h, w), sigmas (B,), `conditions` of B rows."""
    embeds = conditions["prompt_embeds"]
    velocity = transformer(
        Flux2KleinPipeline._pack_latents(latents),  # (B, h w, 128)
        timestep=sigmas,
        guidance=None,
        encoder_hidden_states=embeds,
        txt_ids=Flux2KleinPipeline._prepare_text_ids(embeds).to(latents.device),  # (B, tokens, 4)
        img_ids=Flux2KleinPipeline._prepare_latent_ids(latents).to(latents.device),  # (B, h w, 4)
        return_dict=False,
    )[0]
    return velocity.transpose(1, 2).reshape(latents.shape)


def schedule(noise_scheduler, latents_shape: Sequence[int], num_inference_steps: int) -> torch.Tensor:
    """The pipeline's sigmas (steps + 1,) of sampling latents (B, C, h, w), from 1 down to 0; `noise_scheduler` stays as it is."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config)
    height, width = latents_shape[-2:]
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps),
        mu=compute_empirical_mu(height * width, num_inference_steps),
    )
    return scheduler.sigmas


def targets(transformer: Flux2Transformer2DModel) -> str:
    """The layers that diffusers' script trains, comma-separated. to_out of a double block is a list, so that those of the
    single blocks have to be named one by one."""
    single_blocks = range(transformer.config.num_single_layers)
    outputs = [f"single_transformer_blocks.{n}.attn.to_out" for n in single_blocks]
    return ",".join(["to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj", *outputs])


def is_distilled(pretrained_model_name_or_path: str, revision: str | None) -> bool:
    """Whether the pipeline says of itself that it was distilled to few steps: then it is sampled without guidance."""
    try:
        index = Flux2KleinPipeline.load_config(pretrained_model_name_or_path, revision=revision)
    except OSError:  # a folder with the parts alone
        return False
    return bool(index.get("is_distilled"))


def distilled(pretrained_model_name_or_path: str, revision: str | None) -> str | None:
    """What says that a model was distilled to few steps: its pipeline's configuration, its scheduler, its name or its card;
    None if nothing does."""
    if is_distilled(pretrained_model_name_or_path, revision):
        return "is_distilled in its model_index.json"
    scheduler = FlowMatchEulerDiscreteScheduler.load_config(
        pretrained_model_name_or_path, revision=revision, subfolder="scheduler"
    )
    if scheduler["_class_name"] == "FlowMatchLCMScheduler":
        return "its scheduler is a FlowMatchLCMScheduler"
    return distilled_by_words(pretrained_model_name_or_path, revision)


def predictor(
    pipeline: Flux2KleinPipeline, prompts: list[str], size: tuple[int, int], max_sequence_length: int = 512
) -> partial:
    """(transformer, latents, sigmas) -> velocity for `prompts`, as the pipeline itself encodes them, at any size in pixels."""
    embeds, _ = pipeline.encode_prompt(
        prompts, device=pipeline.transformer.device, max_sequence_length=max_sequence_length
    )
    return partial(predict, conditions={"prompt_embeds": embeds})


def load_small_decoder(pretrained_model_name_or_path: str, vae: AutoencoderKLFlux2) -> AutoencoderKLFlux2:
    """A frozen decoder of FLUX.2's latents in fp32 that is narrower than that of `vae`, without an encoder.

    There is no AutoencoderTiny for FLUX.2; `SMALL_DECODER` is of the VAE's own class, which knows such a decoder from
    diffusers 0.38 on. Raises ValueError, in one line, unless it decodes the latents of `vae`.
    """
    try:
        decoder = load_strictly(AutoencoderKLFlux2.from_pretrained, pretrained_model_name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--tiny_vae_name_or_path: expected an AutoencoderKLFlux2 (hub id or folder), such as {SMALL_DECODER}, "
            f"{pretrained_model_name_or_path!r} could not be loaded: {str(error).splitlines()[0]}"
        ) from error
    for what in ("latent_channels", "block_out_channels"):
        if tuple(np.atleast_1d(decoder.config[what])) != tuple(np.atleast_1d(vae.config[what])):
            raise ValueError(
                f"--tiny_vae_name_or_path: expected {what} {vae.config[what]} as the VAE has, found {decoder.config[what]}"
            )
    decoder.encoder = decoder.quant_conv = None
    decoder.bn = vae.bn  # the transformer's latents are normalised by these numbers
    return decoder.requires_grad_(False).to(vae.device)


def build_pipeline(
    transformer, vae, text_encoders, tokenizers, noise_scheduler, is_distilled: bool
) -> Flux2KleinPipeline:
    """For sampling by Euler steps, all of it on the transformer's device; the VAE in fp32, as the loss decodes with it."""
    return Flux2KleinPipeline(
        vae=vae.to(transformer.device),
        text_encoder=text_encoders.to(transformer.device)[0],
        tokenizer=tokenizers[0].tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config),
        is_distilled=is_distilled,
    )
