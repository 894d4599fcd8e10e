"""The anchor of ACPO eq. 7: what the frozen base model predicts, from the same weights with the LoRA switched off."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import extract_model_from_parallel


@contextmanager
def without_adapter(unet: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Inside, the U-Net is the base model: its LoRA is off. It is on again after, also after an error.

    Args:
        unet: a diffusers U-Net with an adapter (`add_adapter`, or peft's `get_peft_model`), as it is or as
            `accelerator.prepare` returned it. One without an adapter is itself the base: the frozen copy of a full
            fine-tuning.
    Yields:
        The U-Net, out of its parallel wrapper.
    """
    from peft import PeftModel

    model = extract_model_from_parallel(unet)
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield model
    elif getattr(model, "_hf_peft_config_loaded", False):
        model.disable_adapters()
        try:
            yield model
        finally:
            model.enable_adapters()
    else:
        yield model


@torch.no_grad()
def base_prediction(
    unet: torch.nn.Module, noisy_latents: torch.Tensor, timesteps: torch.Tensor, *conditioning: torch.Tensor
) -> torch.Tensor:
    """eps_theta(z_t, t, c): the prediction of the base model, without graph and without a second copy of it (eq. 7).

    Call it before the student's forward pass: its activations are then freed before the student's graph is built. The
    adapter is on again on return: `backward` needs it, gradient checkpointing runs the forward again.

    Args:
        unet: as in `without_adapter`. noisy_latents: (B, C, h, w). timesteps: (B,).
        conditioning: what else the U-Net is called with: encoder_hidden_states (B, tokens, dim), or nothing.
    Returns:
        (B, C, h, w), in the scheduler's prediction type.
    """
    with without_adapter(unet) as model:
        return model(noisy_latents, timesteps, *conditioning, return_dict=False)[0]
