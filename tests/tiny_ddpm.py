"""A real UNet2DModel and scheduler at a tiny size, with random weights, and pictures for them."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image


CONFIG = {
    "sample_size": 32,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def tiny_unet2d(seed: int = 0, **overrides) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(**(CONFIG | overrides)).eval()


def tiny_ddpm(folder: Path, pipeline_class: type = DDPMPipeline, **scheduler_overrides) -> str:
    """A saved DDPMPipeline or DDIMPipeline."""
    pipeline_class(unet=tiny_unet2d(), scheduler=DDPMScheduler(**scheduler_overrides)).save_pretrained(folder)
    return str(folder)


def tiny_ddim(folder: Path) -> str:
    return tiny_ddpm(folder, DDIMPipeline)


def pictures(folder: Path, number: int = 12, size: tuple[int, int] = (36, 40)) -> str:
    """A folder of PNGs: coloured gradients with noise, no two alike."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    ramp = np.linspace(0, 1, size[0])[:, None, None]
    for i in range(number):
        first, last = rng.integers(0, 256, (2, 3))
        pixels = first + (last - first) * ramp + rng.normal(0, 10, (*size, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
    return str(folder)
