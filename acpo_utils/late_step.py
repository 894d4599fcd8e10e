"""Late-step samples of ACPO (section 3.3.1, eq. 5): from a latent z_t with t < tmax to an image in [0, 1], with gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, ModelMixin, StableDiffusionPipeline
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch.utils.checkpoint import checkpoint

from acpo_utils.losses import NoiseScheduler, keep_gradients
from acpo_utils.randomness import batch_randint, batch_randn


def sample_late_timesteps(
    batch_size: int, tmax: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(B,) integers, uniform in 0 <= t < tmax: the late window of the paper. Drawn on the generator's device."""
    return batch_randint(tmax, batch_size, generator, device)


def _alphas_cumprod(noise_scheduler: NoiseScheduler, timesteps: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """(B, 1, ...) abar_t in fp32 on the sample's device; a timestep below 0 stands for the clean end, abar = 1."""
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(device=sample.device, dtype=torch.float32)
    alphas = torch.where(timesteps < 0, 1.0, alphas_cumprod[timesteps.clamp(min=0)])
    return alphas.view(-1, *[1] * (sample.ndim - 1))


def predict_original_sample(
    noise_scheduler: NoiseScheduler, model_pred: torch.Tensor, timesteps: torch.Tensor, noisy_latents: torch.Tensor
) -> torch.Tensor:
    """The one-step estimate of x0 from z_t and the model's prediction, for any prediction type.

    epsilon: (z_t - sqrt(1 - abar) eps) / sqrt(abar); velocity: sqrt(abar) z_t - sqrt(1 - abar) v; sample: as it is
    (Ho et al. 2020, eq. 15; Salimans and Ho 2022, appendix D). The scheduler's clipping is not applied: it would cut
    the gradient.

    Args:
        model_pred, noisy_latents: (B, ...). timesteps: (B,) integers on the same device.
    Returns:
        (B, ...) in fp32.
    Raises:
        ValueError: for an unknown prediction type.
    """
    abar = _alphas_cumprod(noise_scheduler, timesteps, noisy_latents)
    model_pred, noisy_latents = model_pred.float(), noisy_latents.float()
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return (noisy_latents - (1 - abar).sqrt() * model_pred) / abar.sqrt()
    if prediction_type == "v_prediction":
        return abar.sqrt() * noisy_latents - (1 - abar).sqrt() * model_pred
    if prediction_type == "sample":
        return model_pred
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, the scheduler has {prediction_type!r}")


def denoise_late_steps(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise_scheduler: NoiseScheduler,
    model_pred: torch.Tensor,
    timesteps: torch.Tensor,
    noisy_latents: torch.Tensor,
    num_steps: int = 1,
    backprop_steps: int | None = None,
) -> torch.Tensor:
    """z_0_hat of eq. 5: K deterministic DDIM steps from z_t down to 0, with gradient.

    K = 1 is `predict_original_sample`. For K > 1 each sample walks its own even grid t, t (K-1)/K, ..., t/K, 0 (Song et
    al. 2021a, eq. 12 with sigma = 0). The first prediction is given: the anchor has needed it already.

    Args:
        predict: (latents (B, ...), timesteps (B,)) -> prediction (B, ...), the model with its LoRA.
        model_pred: (B, ...) its prediction at `noisy_latents`, `timesteps`.
        backprop_steps: how many of the last predictions keep their gradient (None: all K).
    Returns:
        (B, ...) in fp32.
    Raises:
        ValueError: if num_steps < 1 or backprop_steps is outside 1..num_steps.
    """
    latents = noisy_latents
    for k, with_gradient in enumerate(keep_gradients(num_steps, backprop_steps)):
        timestep = timesteps * (num_steps - k) // num_steps
        if k > 0:
            with torch.set_grad_enabled(with_gradient and torch.is_grad_enabled()):
                model_pred = predict(latents.to(noisy_latents.dtype), timestep)
        elif not with_gradient:
            model_pred = model_pred.detach()
        x0 = predict_original_sample(noise_scheduler, model_pred, timestep, latents)
        if k < num_steps - 1:
            prev_timestep = timesteps * (num_steps - k - 1) // num_steps
            abar = _alphas_cumprod(noise_scheduler, timestep, latents)
            abar_prev = _alphas_cumprod(noise_scheduler, prev_timestep, latents)
            noise_pred = (latents.float() - abar.sqrt() * x0) / (1 - abar).sqrt()
            latents = abar_prev.sqrt() * x0 + (1 - abar_prev).sqrt() * noise_pred
    return x0


def unscale_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """From latents (B, C, h, w) as the denoiser sees them, in fp32, to the VAE's own: FLUX.2's are in patches of 2 x 2."""
    if not hasattr(vae, "bn"):
        return latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()  # (C,)
    latents = latents * std.view(1, -1, 1, 1) + vae.bn.running_mean.view(1, -1, 1, 1)
    return torch.nn.functional.pixel_shuffle(latents, vae.config.patch_size[0])


def decode_latents(vae: ModelMixin, latents: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
    """x_hat = D(z_0_hat) (eq. 5): decode with gradient, in the precision of `vae`, to the range that evaluators expect.

    The same arithmetic as `VaeImageProcessor.postprocess`, without leaving the graph. fp32 is right for every VAE; a fp16
    decode overflows, a bf16 one does not, and rounds. `checkpoint_decoder` trades its activations for a second forward.

    Args:
        latents: (B, C, h, w), as the denoiser sees them.
        batch_size: decode so many samples at a time, each chunk again in the backward pass, so that no more than one
            chunk's activations are kept. None: all at once.
    Returns:
        (B, 3, H, W) fp32 in [0, 1].
    """

    def decode(latents: torch.Tensor) -> torch.Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            return vae.decode(latents, return_dict=False)[0]

    latents = unscale_latents(vae, latents.float()).to(vae.dtype)
    if batch_size is None:
        images = decode(latents)
    else:
        chunks = latents.split(batch_size)
        images = torch.cat([checkpoint(decode, chunk, use_reentrant=False) for chunk in chunks])
    return (images.float() / 2 + 0.5).clamp(0, 1)


def checkpoint_decoder(vae: AutoencoderKL | AutoencoderTiny, enabled: bool = True) -> None:
    """From now on the decoder keeps what goes into each of its blocks, and runs the block again in the backward pass.

    Of an AutoencoderKL each resnet and each upsampler by itself. diffusers' own switch takes an up block at a time, three
    resnets and an upsampler of which all activations are then there at once, and the middle block's attention as well: at
    1024 px in fp32 it peaks at 12.2 GiB, this at 8.6. Of an AutoencoderTiny each block. Values and gradients are the same.
    """
    for module in vae.decoder.modules():
        if isinstance(module, (ResnetBlock2D, Upsample2D, AutoencoderTinyBlock)):
            vars(module).pop("forward", None)
            if enabled:  # a partial of a bound method, which copy.deepcopy binds to the copy
                module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)


def crop_latents(latents: torch.Tensor, side: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """One random window (B, C, side, side) of (B, C, h, w), the same for the whole batch: decoding it costs its share.

    What an evaluator says of it is about details; of what a prompt asks for a window shows a part. A decoder with
    attention, as AutoencoderKL's, sees the window alone, so that near its borders x_hat differs a little.
    """
    top, left = (int(torch.randint(extent - side + 1, (), generator=generator)) for extent in latents.shape[-2:])
    return latents[..., top : top + side, left : left + side]


@torch.no_grad()
def rollout_late_samples(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise_scheduler: NoiseScheduler,
    shape: tuple[int, ...],
    tmax: int,
    num_inference_steps: int = 50,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """On-policy start of the late window: DDIM from noise with the current model until t < tmax, without gradient.

    Args:
        predict: (z_t (B, ...), timestep ()) -> prediction (B, ...). shape: of the samples, (B, C, h, w).
    Returns:
        (B, C, h, w) samples and (B,) their timestep, the first of the sampling schedule that lies below tmax.
    Raises:
        ValueError: if the sampling schedule has no timestep below tmax.
    """
    scheduler = DDIMScheduler.from_config(noise_scheduler.config)
    scheduler.set_timesteps(num_inference_steps, device=device)
    if scheduler.timesteps[-1] >= tmax:
        raise ValueError(
            f"{num_inference_steps} sampling steps end at t = {int(scheduler.timesteps[-1])}, none below tmax {tmax}: "
            "take more sampling steps or a larger tmax"
        )
    samples = batch_randn(shape, generator, device, dtype) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        if timestep < tmax:
            break
        model_pred = predict(samples, timestep)
        samples = scheduler.step(model_pred, timestep, samples, return_dict=False)[0].to(dtype)
    return samples, timestep.repeat(len(samples))


def without_prompt(
    conditions: dict[str, torch.Tensor], negative_conditions: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`conditions` of B captions with what `negative_conditions`, of one row, say in their place: what guidance leads away
    from. Others, as a picture's size, stay."""
    return conditions | {name: value.expand_as(conditions[name]) for name, value in negative_conditions.items()}


def with_guidance(
    predict: Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor],
    conditions: dict[str, torch.Tensor],
    negative_conditions: dict[str, torch.Tensor],
    guidance_scale: float,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The prediction as sampling uses it: (latents (B, ...), timestep ()) -> (B, ...), both halves in one pass of 2 B rows.

    Args:
        predict: (latents, timestep, conditions) -> prediction. conditions: by name, of B rows each. negative_conditions: as in
            `without_prompt`.
        guidance_scale: up to 1 there is no guidance, as in diffusers' pipelines.
    """
    without = without_prompt(conditions, negative_conditions)
    both = {name: torch.cat([without[name], value]) for name, value in conditions.items()}

    def guided(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if guidance_scale <= 1:
            return predict(latents, timestep, conditions)
        negative, positive = predict(latents.repeat(2, 1, 1, 1), timestep, both).chunk(2)
        return negative + guidance_scale * (positive - negative)

    return guided


def rollout_late_latents(
    predict: Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor],
    noise_scheduler: NoiseScheduler,
    conditions: dict[str, torch.Tensor],
    negative_conditions: dict[str, torch.Tensor],
    latents_shape: tuple[int, ...],
    tmax: int,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rollout_late_samples` of a text-to-image model, with classifier-free guidance: (B, 4, h, w) and (B,).

    Args:
        predict, conditions, negative_conditions, guidance_scale: as in `with_guidance`. The latents have device and dtype of
            the condition "prompt_embeds".
    """
    return rollout_late_samples(
        with_guidance(predict, conditions, negative_conditions, guidance_scale),
        noise_scheduler,
        latents_shape,
        tmax=tmax,
        num_inference_steps=num_inference_steps,
        generator=generator,
        device=conditions["prompt_embeds"].device,
        dtype=conditions["prompt_embeds"].dtype,
    )


def lora_below(pipeline: StableDiffusionPipeline, tmax: int) -> Callable[..., dict[str, Any]]:
    """A `callback_on_step_end` for a Stable Diffusion pipeline, by which its LoRA acts at timesteps below `tmax` alone.

    The quality and the anchor loss saw no others; elsewhere the LoRA is what the diffusion loss and chance made of it.
    The adapter has to be loaded, not fused. It is off when this returns, as the first steps want it, and off again after
    each run of the pipeline, so that one callback serves many.

        pipeline.load_lora_weights("acpo-lora-sd")
        pipeline(prompt, callback_on_step_end=lora_below(pipeline, 100))
    """
    pipeline.disable_lora()

    def callback(
        pipeline: StableDiffusionPipeline, step: int, timestep: torch.Tensor, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        following = pipeline.scheduler.timesteps[step + 1 : step + 2]
        if len(following) and following[0] < tmax:
            pipeline.enable_lora()
        else:
            pipeline.disable_lora()
        return callback_kwargs

    return callback
