"""A LoRA of a `UNet2DModel`. diffusers gives that model no `add_adapter`, so it is peft's own: files, loading, fusing.

unet = PeftModel.from_pretrained(pipeline.unet, folder)   # adapter_config.json, adapter_model.safetensors
pipeline.unet = unet.merge_and_unload()                   # fused: a plain UNet2DModel again
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from acpo_utils.lora import register_lora_hooks


ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"


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
