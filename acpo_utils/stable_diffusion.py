"""The parts of a Stable Diffusion pipeline, frozen, as a training wants them."""

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
from transformers import CLIPTextModel, CLIPTokenizer

from acpo_utils.randomness import batch_randn


# What from_pretrained of diffusers calls it: "dtype" is unknown before 0.40, "torch_dtype" warns since.
DTYPE = "dtype" if compare_versions("diffusers", ">=", "0.40.0") else "torch_dtype"


def load_stable_diffusion(pretrained_model_name_or_path: str, revision, variant, weight_dtype: torch.dtype, device):
    """(noise_scheduler, tokenizer, text_encoder, vae, unet) of a hub id or folder; the models frozen, on `device`.

    The VAE is in fp32, since its decode is scored, the others in `weight_dtype`. Raises ValueError, in one line, for
    what is no Stable Diffusion pipeline.
    """
    source = {"pretrained_model_name_or_path": pretrained_model_name_or_path, "revision": revision}
    text, latent = {"variant": variant, "dtype": weight_dtype}, {"variant": variant, DTYPE: weight_dtype}
    try:
        noise_scheduler = DDPMScheduler.from_pretrained(**source, subfolder="scheduler")
        tokenizer = CLIPTokenizer.from_pretrained(**source, subfolder="tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(**source, subfolder="text_encoder", **text)
        vae = AutoencoderKL.from_pretrained(**source, subfolder="vae", variant=variant)
        unet = UNet2DConditionModel.from_pretrained(**source, subfolder="unet", **latent)
    except OSError as error:
        raise ValueError(
            f"--pretrained_model_name_or_path: expected a Stable Diffusion pipeline (hub id or folder), "
            f"{pretrained_model_name_or_path!r} could not be loaded: {str(error).splitlines()[0]}"
        ) from error
    for model in (text_encoder, vae, unet):
        model.requires_grad_(False)
        model.to(device)
    for model in (vae, unet):
        model.to(memory_format=torch.channels_last)
    return noise_scheduler, tokenizer, text_encoder, vae, unet


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
        tiny_vae = AutoencoderTiny.from_pretrained(pretrained_model_name_or_path)
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
    return (mean + std * batch_randn(mean.shape, generator, mean.device, mean.dtype)) * vae.config.scaling_factor


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
