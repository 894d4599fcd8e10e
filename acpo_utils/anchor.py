"""The anchor of ACPO eq. 7: what the frozen base model predicts, from the same weights with the LoRA switched off."""

import torch
from accelerate.utils import extract_model_from_parallel


@torch.no_grad()
def base_prediction(
    unet, noisy_latents: torch.Tensor, timesteps: torch.Tensor, encoder_hidden_states: torch.Tensor
) -> torch.Tensor:
    """eps_theta(z_t, t, c): the prediction of the base model, without graph and without a second copy of it (eq. 7).

    Call it before the student's forward pass: its activations are then freed before the student's graph is built.

    Args:
        unet: a diffusers U-Net with an adapter, as it is or as `accelerator.prepare` returned it. The adapter is on
            again on return, also after an error: `backward` needs it, gradient checkpointing runs the forward again.
        noisy_latents: (B, 4, h, w). timesteps: (B,). encoder_hidden_states: (B, tokens, dim).
    Returns:
        (B, 4, h, w), in the scheduler's prediction type.
    """
    model = extract_model_from_parallel(unet)
    model.disable_adapters()
    try:
        return model(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
    finally:
        model.enable_adapters()
