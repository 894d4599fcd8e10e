"""Unconditional pixel models: the folder of a DDPM or DDIM, read and written; a new U-Net; its error on images."""

import copy
import os
import shutil
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel

from acpo_utils.checkpoints import load_strictly
from acpo_utils.denoising_error import denoising_errors


USAGE = """
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}")
image = pipeline(num_inference_steps={steps}).images[0]
"""
LORA_USAGE = """
from diffusers import DiffusionPipeline
from peft import PeftModel

pipeline = DiffusionPipeline.from_pretrained("{folder}")  # the LoRA is fused into it
image = pipeline(num_inference_steps={steps}).images[0]

base = DiffusionPipeline.from_pretrained("{base_model}")  # the same by hand
base.unet = PeftModel.from_pretrained(base.unet, "{folder}/lora").merge_and_unload()
"""
SAMPLERS = {"ddpm": DDPMPipeline, "ddim": DDIMPipeline}


def load_ddpm(path: str, revision: str | None = None) -> tuple[UNet2DModel, DDPMScheduler | None, str]:
    """The U-Net of an unconditional pipeline, its scheduler for training, and its sampler, "ddpm" or "ddim".

    `path` is a hub id or a folder of a DDPMPipeline or DDIMPipeline, also in the old form without subfolders
    (google/ddpm-cifar10-32), or a folder with the U-Net alone: its scheduler is None.

    Raises ValueError, in one line, if it is something else, or not all of it is there; safetensors only.
    """
    options = {"revision": revision}
    try:
        if Path(path, "config.json").is_file() and not Path(path, "model_index.json").is_file():
            unet = load_strictly(UNet2DModel.from_pretrained, path)
            _check_square_rgb(unet)
            return unet, None, "ddpm"
        name = DDPMPipeline.load_config(path, **options)["_class_name"]
        if name not in ("DDPMPipeline", "DDIMPipeline"):
            raise ValueError(f"it is a {name}")
        subfolders = _subfolders(path, **options)
        noise_scheduler = DDPMScheduler.from_pretrained(path, subfolder=subfolders["scheduler"], **options)
        unet = load_strictly(UNet2DModel.from_pretrained, path, subfolder=subfolders["unet"], **options)
        _check_square_rgb(unet)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--pretrained_model_name_or_path: expected a DDPMPipeline or DDIMPipeline (hub id or folder) or a folder "
            f"with a UNet2DModel, {path!r} could not be loaded: {str(error).splitlines()[0]}"
        ) from error
    return unet, noise_scheduler, name.removesuffix("Pipeline").lower()


def _check_square_rgb(unet: UNet2DModel) -> None:
    size, channels = unet.config.sample_size, (unet.config.in_channels, unet.config.out_channels)
    if not isinstance(size, int) or channels != (3, 3):
        found = f"{channels[0]} channels in, {channels[1]} out, sample_size {size}"
        raise ValueError(f"expected a U-Net of square RGB images, found {found}")


def _subfolders(path: str, **options) -> dict[str, str | None]:
    try:
        UNet2DModel.load_config(path, subfolder="unet", **options)
    except OSError:
        return {"unet": None, "scheduler": None}
    return {"unet": "unet", "scheduler": "scheduler"}


def new_unet(config: str | None, resolution: int) -> UNet2DModel:
    """An untrained U-Net for square RGB images. `config` is the config.json of a UNet2DModel, or a folder with it.

    None is the architecture of diffusers' train_unconditional.py, 114 M parameters.

    Raises ValueError, in one line, if `config` is something else, or the resolution no multiple of what it halves to.
    """
    if config is None:
        unet = UNet2DModel(
            sample_size=resolution,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        )
    else:
        try:
            unet = UNet2DModel.from_config(UNet2DModel.load_config(config), sample_size=resolution)
            _check_square_rgb(unet)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"--model_config_name_or_path: expected the config.json of a UNet2DModel, or a folder with it; "
                f"{config!r} could not be used: {str(error).splitlines()[0]}"
            ) from error
    multiple = 2 ** (len(unet.config.block_out_channels) - 1)
    if resolution < 1 or resolution % multiple:
        raise ValueError(f"--resolution must be a multiple of {multiple} for this U-Net, got {resolution}")
    return unet


def build_pipeline(unet: torch.nn.Module, noise_scheduler, sampler: str) -> DDPMPipeline | DDIMPipeline:
    """The pipeline that samples `unet`, a UNet2DModel or a `PeftModel` of one, by "ddpm" or "ddim"."""
    base = getattr(unet, "get_base_model", None)  # peft's wrapper; what is in it has the LoRA's layers all the same
    return SAMPLERS[sampler](unet=base() if base else unet, scheduler=noise_scheduler)


def save_ddpm(pipeline: DDPMPipeline | DDIMPipeline, output_dir: str | Path, half: bool = False) -> None:
    """`save_pretrained`, each part under a temporary name first. `half` stores fp16 weights; they load as fp32."""
    output_dir = Path(output_dir)
    temporary = output_dir / f".pipeline.{os.getpid()}.tmp"
    if half:
        pipeline = type(pipeline)(unet=copy.deepcopy(pipeline.unet).half(), scheduler=pipeline.scheduler)
    try:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        for part in sorted(temporary.iterdir(), key=lambda part: part.is_file()):  # model_index.json last
            if part.is_dir():
                (output_dir / part.name).mkdir(parents=True, exist_ok=True)
                for file in part.iterdir():
                    os.replace(file, output_dir / part.name / file.name)
            else:
                os.replace(part, output_dir / part.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def usage_example(output_dir: str | Path, base_model: str | None, num_inference_steps: int) -> str:
    """Python code for the model card of a folder that `save_ddpm` wrote, with the LoRA's if it holds one."""
    text = LORA_USAGE if Path(output_dir, "lora").is_dir() else USAGE
    return text.format(folder=Path(output_dir).resolve().name, base_model=base_model, steps=num_inference_steps)


@torch.no_grad()
def denoising_error(
    unet: torch.nn.Module, noise_scheduler, images: torch.Tensor, seed: int = 0, batch_size: int = 16
) -> torch.Tensor:
    """MSE of the paper's table 1 by `denoising_errors`, batch by batch: two models are asked the same.

    Args:
        unet: UNet2DModel, on any device. noise_scheduler: of its training. images: (N, 3, H, W) in [0, 1].
    Returns:
        (N,) errors, in fp32 on the CPU; lower is better.
    """
    device, errors = next(unet.parameters()).device, []
    for start in range(0, len(images), batch_size):
        x0 = images[start : start + batch_size].to(device) * 2 - 1  # (B, 3, H, W) in [-1, 1]
        rows = range(start, start + len(x0))
        errors.append(denoising_errors(lambda z, t: unet(z, t, return_dict=False)[0], noise_scheduler, x0, rows, seed))
    return torch.cat(errors).cpu()
