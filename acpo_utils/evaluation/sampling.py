"""Base against fine-tuned model: images from the same prompts and the same initial noise, and their scores."""

import numpy as np
import torch
from tqdm.auto import tqdm

from acpo_utils.randomness import step_generator


def image_tensor(images: torch.Tensor | np.ndarray) -> torch.Tensor:
    """(B, 3, H, W) in fp32 on the CPU: DDPMPipeline and DDIMPipeline before diffusers 0.41 give numpy for "pt" too."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return images.float().cpu()


def sample_images(
    pipeline,
    prompts: list[str],
    seed: int,
    batch_size: int = 8,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    description: str = "sampling",
    resolution: int | None = None,
    **more,
) -> torch.Tensor:
    """(N, 3, H, W) fp32 images in [0, 1] on the CPU. Prompt i starts from noise (seed, i), whatever the batch size.

    H = W = `resolution`; None: the size that is the pipeline's own. `more`: what else the pipeline is called with.
    """
    images = []
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=len(prompts), desc=description) as progress:
        for start in range(0, len(prompts), batch_size):
            chunk = prompts[start : start + batch_size]
            output = pipeline(
                prompt=chunk,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=resolution,
                width=resolution,
                generator=[step_generator(seed, start + i) for i in range(len(chunk))],
                output_type="pt",
                **more,
            )
            images.append(image_tensor(output.images))
            progress.update(len(chunk))
    return torch.cat(images)


def sample_unconditional(
    pipeline,
    num_images: int,
    seed: int,
    batch_size: int = 16,
    num_inference_steps: int = 1000,
    description: str = "sampling",
) -> torch.Tensor:
    """The same of a DDPMPipeline or DDIMPipeline: image i has the noise of (seed, i), at every step that draws some."""
    images = []
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=num_images, desc=description) as progress:
        for start in range(0, num_images, batch_size):
            generators = [step_generator(seed, i) for i in range(start, min(start + batch_size, num_images))]
            output = pipeline(
                batch_size=len(generators),
                generator=generators,
                num_inference_steps=num_inference_steps,
                output_type="pt",
            )
            images.append(image_tensor(output.images))
            progress.update(len(generators))
    return torch.cat(images)


@torch.no_grad()
def score_images(
    evaluator, images: torch.Tensor, prompts: list[str] | None, device, batch_size: int = 32
) -> torch.Tensor:
    """(N,) scores on the CPU, multiplied into the evaluator's `score_range` if it has one."""
    low, high = getattr(evaluator, "score_range", (0.0, 1.0))
    scores = []
    for start in range(0, len(images), batch_size):
        chunk = slice(start, start + batch_size)
        scores.append(evaluator.score(images[chunk].to(device), prompts and prompts[chunk]).float().cpu())
    return low + (high - low) * torch.cat(scores)
