"""Before a training: the guide keeps its contract on images as the step will hand them over, and is hard to fool."""

import logging

import torch
from diffusers.utils.torch_utils import randn_tensor

from acpo_utils.data import collate, to_device
from acpo_utils.evaluators import check_evaluator
from acpo_utils.evaluators.worst_point import worst_point
from acpo_utils.families.latents import encode_images, latents_shape
from acpo_utils.late_step import decode_latents
from acpo_utils.randomness import step_generator


logger = logging.getLogger(__name__)
FRAGILE = 0.2  # of the range of scores, by one signed step of 2 of 255


def check_guide(evaluator, images: torch.Tensor, prompts: list[str] | None, perturbation: float) -> None:
    """Raises ValueError as `check_evaluator` does; warns of a guide that one step of 2/255 moves by a fifth of its range.

    Args:
        images: (B, 3, H, W) in [0, 1]. perturbation: --guide_perturbation; with one there is nothing to warn of.
    """
    scores = check_evaluator(evaluator, images, prompts)  # (B,)
    if perturbation:
        return
    with torch.no_grad():
        fall = (scores - evaluator.score(worst_point(evaluator, images, prompts, 2.0), prompts)).mean().item()
    if fall > FRAGILE:
        logger.warning(
            f"The guide falls by {fall:.0%} of its range when each pixel moves by 2 of 255: its gradient says more of its own "
            "blind spots than of the image. --guide_perturbation 2 scores the worst such point too."
        )


@torch.no_grad()
def decoded_examples(train_set, vae, decoder, device, args) -> tuple[torch.Tensor, list[str]]:
    """Two images (2, 3, H, W) in [0, 1] of `train_set` through the VAE, or of noise if it holds prompts alone, and their
    prompts. `args`: the Stable Diffusion scripts'."""
    batch = collate([train_set[n] for n in range(min(2, len(train_set)))])
    batch = to_device(batch, device)
    generator = step_generator(args.seed)
    if args.train_prompts:
        shape = latents_shape(vae, len(batch["prompts"]), args.resolution)
        latents = randn_tensor(shape, generator, torch.device(device))
    else:
        latents = encode_images(batch, vae, generator)
    return decode_latents(decoder, latents), batch["prompts"]
