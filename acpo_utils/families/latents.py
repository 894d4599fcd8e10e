"""Between pixels and latents: what a family has of its AutoencoderKL, and which decoder stands in for the VAE's."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from acpo_utils.files import load_strictly
from acpo_utils.randomness import batch_randn


def vae_factor(vae: AutoencoderKL) -> int:
    """Pixels along a side per latent of the VAE's own."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def patch_side(vae: AutoencoderKL) -> int:
    """How many of the VAE's latents, along a side, are one of the denoiser's: 2 of FLUX.2, else 1."""
    return vae.config.get("patch_size", (1, 1))[0]


def latent_factor(vae: AutoencoderKL) -> int:
    """Pixels along a side per latent as the denoiser sees it."""
    return vae_factor(vae) * patch_side(vae)


def latents_shape(vae: AutoencoderKL, batch_size: int, resolution: int) -> tuple[int, int, int, int]:
    side = resolution // latent_factor(vae)
    return (batch_size, vae.config.latent_channels * patch_side(vae) ** 2, side, side)


def check_sizes(noise_scheduler, vae, unet, tmax: int, resolution: int, decode_size: int | None) -> None:
    """Raises ValueError, in one line, for a late window or sizes in pixels that the models cannot do.

    `unet`: a U-Net, whose levels halve the sides, or a transformer, whose tokens are patches of 2 x 2 of the VAE's latents.
    """
    total = noise_scheduler.config.num_train_timesteps
    if not 1 <= tmax <= total:
        raise ValueError(f"--tmax must be in 1..{total}, the model's number of training timesteps, got {tmax}")
    factor = latent_factor(vae)
    levels = len(unet.config.get("block_out_channels", (1, 1)))
    multiple = max(factor, vae_factor(vae) * 2 ** (levels - 1))
    if resolution < 1 or resolution % multiple:
        raise ValueError(f"--resolution must be a multiple of {multiple} for this model, got {resolution}")
    largest = multiple * unet.config.get("pos_embed_max_size", resolution)  # positions of a Stable Diffusion 3
    if resolution > largest:
        raise ValueError(f"--resolution must be at most {largest} for this transformer, got {resolution}")
    if decode_size and (decode_size % factor or not 0 < decode_size <= resolution):
        raise ValueError(f"--decode_size must be a multiple of {factor} up to the resolution, got {decode_size}")


def scale_latents(latents: torch.Tensor, vae) -> torch.Tensor:
    """From the VAE's own latents to those that the denoiser sees; `acpo_utils.late_step.unscale_latents` is the way back."""
    if hasattr(vae, "bn"):
        patches = F.pixel_unshuffle(latents, patch_side(vae))
        return F.batch_norm(patches, vae.bn.running_mean, vae.bn.running_var, eps=vae.config.batch_norm_eps)
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def encode_images(batch: dict, vae: AutoencoderKL, generator: torch.Generator | None) -> torch.Tensor:
    """Latents (B, C, h, w) as the denoiser sees them, a sample of the VAE's posterior.

    Of `batch["pixel_values"]` (B, 3, H, W) in [-1, 1], or of `batch["latent_moments"]` (B, 8, h, w), what
    `acpo_utils.data.latent_cache` kept of the encoder's output.
    """
    if "latent_moments" in batch:
        posterior = DiagonalGaussianDistribution(batch["latent_moments"].float())
    else:
        posterior = vae.encode(batch["pixel_values"]).latent_dist
    mean, std = posterior.mean, posterior.std  # (B, 4, h, w)
    return scale_latents(mean + std * batch_randn(mean.shape, generator, mean.device, mean.dtype), vae)


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


def decoder_in(dtype: torch.dtype, vae: AutoencoderKL | AutoencoderTiny) -> AutoencoderKL | AutoencoderTiny:
    """The decoder of `vae` in `dtype`, a copy without an encoder; `vae` itself, which encodes and samples, stays."""
    decoder = copy.deepcopy(vae)
    decoder.encoder = decoder.quant_conv = None
    # diffusers' own `to` warns of modules that want fp32, of which there are none.
    decoder = torch.nn.Module.to(decoder, dtype)
    if hasattr(vae, "bn"):  # what undoes the scaling of FLUX.2's latents, which are in fp32 then
        decoder.bn = copy.deepcopy(vae.bn)
    return decoder


def build_decoder(vae: AutoencoderKL, args, load_tiny: Callable = load_tiny_vae):
    """What decodes in training, by --decode, --decode_dtype and --tiny_vae_name_or_path of `args`; `vae` itself stays.

    `load_tiny`: (the last of these flags, `vae`) -> the decoder that it names.
    """
    decoder = load_tiny(args.tiny_vae_name_or_path, vae) if args.tiny_vae_name_or_path else vae
    if args.decode_dtype == "bf16":
        decoder = decoder_in(torch.bfloat16, decoder)
    return StraightThrough(vae, decoder) if args.decode == "straight_through" else decoder


class StraightThrough(torch.nn.Module):
    """A decoder with the images of `vae` and the gradient of another decoder, `backward_vae`, for `decode_latents`.

    `vae` runs without graph: half of its FLOP, and none of its activations are kept. A guide sees what the pipeline draws, so
    that its gradient g with respect to the image is exact; on its way to the latents the other decoder's Jacobian stands in
    for that of `vae`: J_other^T g for J^T g. The straight-through estimator of Bengio et al. (2013).

    Args:
        vae, backward_vae: of the same latents; each in its own dtype and with its own scaling_factor.
    """

    def __init__(self, vae: AutoencoderKL, backward_vae: AutoencoderKL | AutoencoderTiny):
        super().__init__()
        self.vae, self.backward_vae = vae, backward_vae
        if hasattr(vae, "bn"):  # by which `unscale_latents` knows a VAE of FLUX.2
            self.bn = vae.bn

    @property
    def config(self):
        return self.vae.config

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    @property
    def decoder(self) -> torch.nn.Module:
        """What has a graph, to be checkpointed or compiled."""
        return self.backward_vae.decoder

    def decode(self, latents: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        """(images (B, 3, H, W),) about in [-1, 1], of latents (B, C, h, w) as the VAE itself has them."""
        with torch.no_grad():
            exact = self.vae.decode(latents, return_dict=False)[0]
        other, own = self.backward_vae, latents
        if not hasattr(other, "bn"):  # FLUX.2's decoders have the VAE's own latents, others a scale of their own
            own = scale_latents(latents, self.vae) / other.config.scaling_factor
            own = own + (other.config.get("shift_factor") or 0.0)
        drawn = other.decode(own.to(other.dtype), return_dict=False)[0].to(exact.dtype)
        return (exact + (drawn - drawn.detach()),)


def offload_encoders(vae: AutoencoderKL, *text_encoders: torch.nn.Module) -> None:
    """Off the device with what a cache has made needless; `build_pipeline` brings it back."""
    for model in (vae.encoder, *text_encoders):
        model.to("cpu")


def compile_models(unet: torch.nn.Module, decoder: torch.nn.Module, backend: str = "inductor") -> None:
    """torch.compile of the U-Net and of the decoder's network, in place: names of weights and checkpoints stay the same.

    The U-Net is compiled twice at its first calls: with the LoRA, and without it for the anchor.
    """
    unet.compile(backend=backend)
    decoder.decoder.compile(backend=backend)
