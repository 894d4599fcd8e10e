"""The parts of a Stable Diffusion pipeline, frozen, as a training wants them."""

from pathlib import Path

import torch
from accelerate.utils import compare_versions
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from acpo_utils.files import load_strictly, one_line
from acpo_utils.randomness import batch_randn


# What from_pretrained of diffusers calls it: "dtype" is unknown before 0.40, "torch_dtype" warns since.
DTYPE = "dtype" if compare_versions("diffusers", ">=", "0.40.0") else "torch_dtype"
# Another family's pipeline, and the script that is made for it.
OTHER_SCRIPTS = {
    "DDPMPipeline": "train_acpo_ddpm.py",
    "DDIMPipeline": "train_acpo_ddpm.py",
    "StableDiffusionXLPipeline": "diffusers' train_text_to_image_lora_sdxl.py, without ACPO",
    "StableDiffusion3Pipeline": "diffusers' train_dreambooth_lora_sd3.py, without ACPO",
    "FluxPipeline": "diffusers' train_dreambooth_lora_flux.py, without ACPO",
}


def load_stable_diffusion(
    pretrained_model_name_or_path: str,
    revision: str | None,
    variant: str | None,
    weight_dtype: torch.dtype,
    device: str | torch.device,
    vae_dtype: torch.dtype = torch.float32,
):
    """(noise_scheduler, tokenizer, text_encoder, vae, unet) of a hub id, a folder or a .safetensors file; frozen, on `device`.

    In a training the VAE is in fp32, since its decode is scored, the others in `weight_dtype`. Every part is loaded from safetensors, and
    strictly. Raises ValueError, in one line, for what is no Stable Diffusion pipeline, or not all of one.
    """
    source = str(pretrained_model_name_or_path)
    if source.endswith((".ckpt", ".pt", ".bin")):
        raise ValueError(f"{source}: expected .safetensors, found a pickle, which can run any code. Convert it first.")
    try:
        if source.endswith(".safetensors"):
            pipeline = _load_single_file(source, weight_dtype, vae_dtype)
            parts = [pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.unet]
            scheduler_config = pipeline.scheduler.config
        else:
            _check_configs(source, revision)
            parts = _load_folder(source, revision, variant, weight_dtype, vae_dtype)
            scheduler_config = DDPMScheduler.load_config(source, revision=revision, subfolder="scheduler")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--pretrained_model_name_or_path: expected a Stable Diffusion pipeline (hub id, folder, or .safetensors file), "
            f"{source!r} could not be loaded: {one_line(error)[:400]}{_variant_hint(source, variant)}"
        ) from error
    tokenizer, text_encoder, vae, unet = parts
    _limit_tokenizer(tokenizer, text_encoder)
    for model in (text_encoder, vae, unet):
        model.requires_grad_(False)
        model.to(device)
    return latent_scheduler(scheduler_config), tokenizer, text_encoder, vae, unet


def latent_scheduler(config: dict) -> DDPMScheduler:
    """A DDPMScheduler by the configuration of any scheduler of a Stable Diffusion pipeline, for training and rollouts.

    The configuration of a PNDM, Euler or DPM++ scheduler says nothing of `clip_sample`, which DDPM and DDIM would then
    switch on; latents are not pixels, and leave [-1, 1]. `steps_offset` is what the pipeline itself sets.
    """
    return DDPMScheduler.from_config(config, clip_sample=False, thresholding=False, steps_offset=1)


def _load_folder(
    source: str, revision: str | None, variant: str | None, weight_dtype: torch.dtype, vae_dtype: torch.dtype
) -> list:
    tokenizer = CLIPTokenizer.from_pretrained(source, revision=revision, subfolder="tokenizer")
    models = [
        load_strictly(
            model.from_pretrained,
            source,
            subfolder=subfolder,
            revision=revision,
            variant=variant,
            **{"dtype" if model is CLIPTextModel else DTYPE: dtype},
        )
        for model, subfolder, dtype in (
            (CLIPTextModel, "text_encoder", weight_dtype),
            (AutoencoderKL, "vae", vae_dtype),
            (UNet2DConditionModel, "unet", weight_dtype),
        )
    ]
    return [tokenizer, *models]


def _load_single_file(source: str, weight_dtype: torch.dtype, vae_dtype: torch.dtype) -> StableDiffusionPipeline:
    """A single file has no configurations: a pipeline's folder around it has, as in the hub's repositories of SD-1.x."""
    if not Path(source).is_file():
        raise ValueError("there is no such file.")
    folder = Path(source).parent
    configurations = {}
    if Path(folder, "model_index.json").is_file():
        _check_configs(str(folder), None)
        configurations = {"config": str(folder)}
    try:
        vae = AutoencoderKL.from_single_file(source, subfolder="vae", **configurations, **{DTYPE: vae_dtype})
        return StableDiffusionPipeline.from_single_file(
            source,
            **configurations,
            vae=vae,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **{DTYPE: weight_dtype},
        )
    except Exception as error:  # of many kinds: safetensors, keys that do not fit, network
        hint = ""
        if not configurations:
            hint = (
                " A single file holds no configurations: put it into its model's folder, beside model_index.json, or let "
                "diffusers take those of the hub's model of its kind, which needs the hub or an earlier download."
            )
        raise ValueError(f"{one_line(error)[:200]}{hint}") from error


def _check_configs(source: str, revision: str | None) -> None:
    """Raises ValueError for another family's pipeline, or parts that do not fit each other, before a weight is read."""
    try:
        name = StableDiffusionPipeline.load_config(source, revision=revision).get("_class_name", "")
    except OSError:  # a folder with the parts alone
        name = "StableDiffusionPipeline"
    if not name.startswith("StableDiffusion") or name in OTHER_SCRIPTS:
        script = OTHER_SCRIPTS.get(name)
        raise ValueError(f"it is a {name}{f', for {script}' if script else ''}.")
    unet = UNet2DConditionModel.load_config(source, revision=revision, subfolder="unet")
    vae = AutoencoderKL.load_config(source, revision=revision, subfolder="vae")
    text_encoder = CLIPTextConfig.from_pretrained(source, revision=revision, subfolder="text_encoder")
    if unet["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"its U-Net takes {unet['in_channels']} channels where its VAE has {vae['latent_channels']}: an inpainting or "
            "another image-conditioned model, for which there is no script here."
        )
    if unet["cross_attention_dim"] != text_encoder.hidden_size:
        raise ValueError(
            f"its U-Net attends to embeddings of {unet['cross_attention_dim']} numbers, and its text encoder gives "
            f"{text_encoder.hidden_size}."
        )


def _limit_tokenizer(tokenizer, text_encoder) -> None:
    """The text encoder's positions are the limit where a tokenizer names none, or a larger one.

    Raises ValueError for a tokenizer with more tokens than the text encoder embeds.
    """
    config = text_encoder.config
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"--pretrained_model_name_or_path: the tokenizer has {len(tokenizer)} tokens, the text encoder embeds "
            f"{config.vocab_size}: they are of different models, or tokens were added without resizing the embeddings."
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)


def _variant_hint(source: str, variant: str | None) -> str:
    if variant is None and (found := sorted(Path(source).glob("*/*.fp16.safetensors"))):
        return f" It holds {found[0].parent.name}/{found[0].name}: give --variant fp16."
    return ""


def compile_models(unet: torch.nn.Module, decoder: torch.nn.Module, backend: str = "inductor") -> None:
    """torch.compile of the U-Net and of the decoder's network, in place: names of weights and checkpoints stay the same.

    The U-Net is compiled twice at its first calls: with the LoRA, and without it for the anchor.
    """
    unet.compile(backend=backend)
    decoder.decoder.compile(backend=backend)


def load_tiny_vae(pretrained_model_name_or_path: str, vae: AutoencoderKL) -> AutoencoderTiny:
    """A frozen AutoencoderTiny (TAESD) in fp32 beside `vae`. Raises ValueError, in one line, unless it decodes the
    latents of `vae`."""
    try:
        tiny_vae = load_strictly(AutoencoderTiny.from_pretrained, pretrained_model_name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--tiny_vae_name_or_path: expected an AutoencoderTiny (hub id or folder), {pretrained_model_name_or_path!r} "
            f"could not be loaded: {str(error).splitlines()[0]}"
        ) from error
    for what in ("latent_channels", "in_channels"):
        if tiny_vae.config[what] != vae.config[what]:
            raise ValueError(
                f"--tiny_vae_name_or_path: expected {vae.config[what]} {what} as the VAE has, found {tiny_vae.config[what]}"
            )
    upsamplings = (len(tiny_vae.config.num_decoder_blocks) - 1, len(vae.config.block_out_channels) - 1)
    if upsamplings[0] != upsamplings[1]:
        expected, found = (2**n for n in reversed(upsamplings))
        raise ValueError(f"--tiny_vae_name_or_path: expected {expected} pixels per latent, found {found}")
    return tiny_vae.requires_grad_(False).to(vae.device)


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


def latent_factor(vae: AutoencoderKL) -> int:
    """Pixels per latent along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latents_shape(vae: AutoencoderKL, batch_size: int, resolution: int) -> tuple[int, int, int, int]:
    side = resolution // latent_factor(vae)
    return (batch_size, vae.config.latent_channels, side, side)


def check_sizes(noise_scheduler, vae, unet, tmax: int, resolution: int, decode_size: int | None) -> None:
    """Raises ValueError, in one line, for a late window or sizes in pixels that the models cannot do."""
    total = noise_scheduler.config.num_train_timesteps
    if not 1 <= tmax <= total:
        raise ValueError(f"--tmax must be in 1..{total}, the model's number of training timesteps, got {tmax}")
    factor = latent_factor(vae)
    multiple = factor * 2 ** (len(unet.config.block_out_channels) - 1)
    if resolution < 1 or resolution % multiple:
        raise ValueError(f"--resolution must be a multiple of {multiple} for this VAE and U-Net, got {resolution}")
    if decode_size and (decode_size % factor or not 0 < decode_size <= resolution):
        raise ValueError(f"--decode_size must be a multiple of {factor} up to the resolution, got {decode_size}")


def scale_latents(latents: torch.Tensor, vae) -> torch.Tensor:
    """From the VAE's own latents to those that the U-Net sees; `acpo_utils.late_step.decode_latents` is the way back."""
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def encode_images(batch: dict, vae: AutoencoderKL, generator: torch.Generator | None) -> torch.Tensor:
    """Latents (B, 4, h, w) as the U-Net sees them, a sample of the VAE's posterior.

    Of `batch["pixel_values"]` (B, 3, H, W) in [-1, 1], or of `batch["latent_moments"]` (B, 8, h, w), what
    `acpo_utils.data.latent_cache` kept of the encoder's output.
    """
    if "latent_moments" in batch:
        posterior = DiagonalGaussianDistribution(batch["latent_moments"].float())
    else:
        posterior = vae.encode(batch["pixel_values"]).latent_dist
    mean, std = posterior.mean, posterior.std  # (B, 4, h, w)
    return scale_latents(mean + std * batch_randn(mean.shape, generator, mean.device, mean.dtype), vae)


@torch.no_grad()
def encode_prompts(batch: dict, text_encoder: CLIPTextModel) -> torch.Tensor:
    """Prompt embeddings (B, tokens, dim) of `batch["input_ids"]` (B, tokens), or those kept in the batch."""
    if "prompt_embeds" in batch:
        return batch["prompt_embeds"]
    return text_encoder(batch["input_ids"], return_dict=False)[0]


def offload_encoders(vae: AutoencoderKL, text_encoder: CLIPTextModel) -> None:
    """Off the device with what a cache has made needless; `build_pipeline` brings it back."""
    vae.encoder.to("cpu")
    text_encoder.to("cpu")
