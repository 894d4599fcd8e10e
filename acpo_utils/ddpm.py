"""Unconditional pixel models: the folder of a DDPM or DDIM, read and written; a new U-Net; a LoRA of a `UNet2DModel`.

diffusers gives that model no `add_adapter`, so its LoRA is peft's own:

unet = PeftModel.from_pretrained(pipeline.unet, folder)   # adapter_config.json, adapter_model.safetensors
pipeline.unet = unet.merge_and_unload()                   # fused: a plain UNet2DModel again
"""

import copy
import os
import shutil
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from acpo_utils.files import load_strictly
from acpo_utils.lora import register_lora_hooks


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
ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"


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


def resolve_late_window(
    noise_scheduler: DDPMScheduler, num_inference_steps: int, tmax: int | None = None, last_steps: int | None = None
) -> tuple[int, int]:
    """The late window both ways: its upper end tmax, and how many of the last sampling steps have t < tmax.

    One is given, the other follows from the sampling schedule; neither is the full trajectory. The tmax of N last
    steps is the timestep of the step before them: with 1,000 sampling steps of 1,000 the last 10 have t < 10, with 50
    sampling steps they have t < 200.

    Raises:
        ValueError: for a number outside of the schedule.
    """
    total = noise_scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= total:
        found = f"1..{total}, the model's number of training timesteps, got {num_inference_steps}"
        raise ValueError(f"--ddpm_num_inference_steps must be in {found}")
    scheduler = type(noise_scheduler).from_config(noise_scheduler.config)  # another one: the caller's is left alone
    scheduler.set_timesteps(num_inference_steps)
    if last_steps is not None:
        if not 1 <= last_steps <= num_inference_steps:
            found = f"1..{num_inference_steps}, the number of sampling steps, got {last_steps}"
            raise ValueError(f"--last_steps must be in {found}")
        tmax = total if last_steps == num_inference_steps else int(scheduler.timesteps[-last_steps - 1])
    tmax = total if tmax is None else tmax
    if not 1 <= tmax <= total:
        raise ValueError(f"--tmax must be in 1..{total}, the model's number of training timesteps, got {tmax}")
    return tmax, int((scheduler.timesteps < tmax).sum())


def usage_example(output_dir: str | Path, base_model: str | None, num_inference_steps: int) -> str:
    """Python code for the model card of a folder that `save_ddpm` wrote, with the LoRA's if it holds one."""
    text = LORA_USAGE if Path(output_dir, "lora").is_dir() else USAGE
    return text.format(folder=Path(output_dir).resolve().name, base_model=base_model, steps=num_inference_steps)


def save_adapter(unet: torch.nn.Module, output_dir: str | Path) -> Path:
    """Writes the LoRA of a `PeftModel` as peft does, without peft's own README.md. Returns the weights' file."""
    output_dir = Path(output_dir)
    temporary = output_dir / f".lora.{os.getpid()}.tmp"
    try:
        unet.save_pretrained(temporary)
        for name in (ADAPTER_CONFIG_NAME, ADAPTER_NAME):
            os.replace(temporary / name, output_dir / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output_dir / ADAPTER_NAME


def load_adapter(unet: torch.nn.Module, path: str | Path) -> None:
    """Loads a folder of `save_adapter` into the LoRA that the `PeftModel` already has.

    Raises ValueError if there is none, if it is damaged, or if its layers or rank are others; nothing is loaded then.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    file = Path(path) / ADAPTER_NAME
    if not file.is_file():
        raise ValueError(f"LoRA {path}: expected a folder with {ADAPTER_CONFIG_NAME} and {ADAPTER_NAME}, found none.")
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"LoRA {file} is damaged: {' '.join(str(error).split())}") from error
    expected = get_peft_model_state_dict(unet)
    differing = sorted(
        name for name in expected.keys() | found.keys()
        if name not in found or name not in expected or found[name].shape != expected[name].shape
    )  # fmt: skip
    if differing:
        raise ValueError(
            f"LoRA {file} belongs to another model, or has another rank or other target modules: {len(differing)} of "
            f"{len(expected)} tensors differ, e.g. {differing[0]}."
        )
    set_peft_model_state_dict(unet, found)


def register_adapter_hooks(accelerator, unet: torch.nn.Module) -> None:
    """`acpo_utils.lora.register_lora_hooks` of a LoRA that peft stores."""
    register_lora_hooks(accelerator, unet, save_adapter, load_adapter)
