"""A LoRA's file, as `load_lora_weights` of diffusers reads it: written whole or not at all, checked before it is loaded."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from acpo_utils.files import one_line
from acpo_utils.sharding import full_weights


LORA_NAME = "pytorch_lora_weights.safetensors"


def save_lora(unet: UNet2DConditionModel, output_dir: str | Path) -> Path:
    """Writes the U-Net's "default" adapter, in fp32 and with its rank and alpha, for `load_lora_weights`.

    Returns the file `output_dir/pytorch_lora_weights.safetensors`. Two choices that are easily made wrong: the PEFT
    names are kept, since diffusers' `convert_state_dict_to_diffusers` renames only to_q, to_k, to_v and to_out and
    the loader then drops every other layer in silence; and the adapter's configuration is stored as metadata, since
    otherwise alpha is taken to be the rank when the file is loaded.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(unet, dict(unet.named_parameters()))
    layers = {name: weight.detach().float().cpu() for name, weight in weights.items()}
    metadata = _collate_lora_metadata({"unet": unet})
    output_dir = Path(output_dir)
    temporary = output_dir / f".lora.{os.getpid()}.tmp"
    try:
        StableDiffusionPipeline.save_lora_weights(temporary, unet_lora_layers=layers, **metadata)
        os.replace(temporary / LORA_NAME, output_dir / LORA_NAME)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output_dir / LORA_NAME


def _read_lora(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The U-Net's tensors of a LoRA file or folder under PEFT names (`....lora_A.weight`), and its configuration."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    file = Path(path) / LORA_NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"LoRA file not found: {file}. Expected a .safetensors file or a folder with {LORA_NAME}.")
    try:
        weights = load_file(file)
        with safe_open(file, framework="pt") as handle:
            adapter = json.loads((handle.metadata() or {}).get("lora_adapter_metadata", "{}"))
        if not isinstance(adapter, dict):
            raise ValueError("lora_adapter_metadata is no object")
        weights, network_alphas = StableDiffusionPipeline.lora_state_dict(weights)
        alphas = sorted({float(alpha) for alpha in (network_alphas or {}).values()})
    except Exception as error:  # diffusers, converting other formats, raises whatever a name or a tensor leads to
        raise ValueError(f"LoRA file {file} is damaged or in no known format: {one_line(error)}") from error

    other = sorted({name.split(".")[0] for name in weights if not name.startswith("unet.")})
    if other or not weights:
        found = one_line(", ".join(other)) or "none"
        raise ValueError(f"LoRA file {file}: expected only tensors named unet.*, found {found}.")
    weights = convert_unet_state_dict_to_peft({name.removeprefix("unet."): value for name, value in weights.items()})

    config = {name.removeprefix("unet."): value for name, value in adapter.items() if name.startswith("unet.")}
    unsupported = [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(name)]
    ranks = sorted({(*weight.shape, 0)[0] for name, weight in weights.items() if name.endswith(".lora_A.weight")})
    if unsupported or len(ranks) != 1 or ranks == [0] or len(alphas) > 1:
        raise ValueError(
            f"LoRA file {file}: expected one rank and one alpha for all layers, found ranks {ranks}"
            f"{f', alphas {alphas}' if alphas else ''}{f', {unsupported}' if unsupported else ''}."
        )
    targets = config.get("target_modules") or {name.split(".lora_")[0] for name in weights}
    alpha = config.get("lora_alpha", alphas[0] if alphas else ranks[0])
    # PEFT takes a string for a regular expression.
    listed = isinstance(targets, (list, set)) and all(isinstance(target, str) for target in targets)
    if not (listed or isinstance(targets, str)) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e300:
        raise ValueError(
            f"LoRA file {file}: expected a number for lora_alpha and names for target_modules, found {alpha!r} and "
            f"{targets!r}."
        )
    targets = sorted(targets) if listed else targets
    return weights, {"rank": ranks[0], "alpha": alpha, "target_modules": targets}


def read_lora_config(path: str | Path) -> dict:
    """`rank`, `alpha` and `target_modules` of a LoRA file or folder, to create the adapter it is loaded into.

    A file without metadata has alpha = rank (as `load_lora_weights` takes it) and lists its layers by full name.
    Raises ValueError if the file is missing, damaged, or mixes ranks.
    """
    return _read_lora(path)[1]


def load_lora(unet: UNet2DConditionModel, path: str | Path, adapter_name: str = "default") -> None:
    """Loads a LoRA file or folder into the adapter that `unet` already has, in the adapter's own dtype.

    Raises ValueError if the file is missing or damaged, belongs to another U-Net, or has another rank, alpha or set
    of layers than the adapter; nothing is loaded then.
    """
    from peft import get_peft_model_state_dict

    found, config = _read_lora(path)
    modules = dict(unet.named_modules())
    for name, weight in found.items():
        layer, _, matrix = name.partition(".lora_")
        module = getattr(modules.get(layer), "base_layer", modules.get(layer))
        shape = tuple(getattr(getattr(module, "weight", None), "shape", ()))  # () of a block or an activation
        dimension = {"A.weight": slice(1, 2), "B.weight": slice(0, 1)}.get(matrix, slice(0, 0))
        if not shape or weight.shape[dimension] != shape[dimension]:
            expected = f"a layer of shape {shape}" if shape else "no such layer"
            raise ValueError(
                f"LoRA {path} belongs to another model: {name} has shape {tuple(weight.shape)}, the U-Net has {expected}."
            )

    adapter = unet.peft_config[adapter_name]
    for option, expected, value in (
        ("rank", adapter.r, config["rank"]),
        ("alpha", adapter.lora_alpha, config["alpha"]),
    ):
        if expected != value:
            raise ValueError(
                f"LoRA {path} has {option} {value}, expected {expected}: create the adapter with {value}."
            )
    expected = get_peft_model_state_dict(unet, dict(unet.named_parameters()), adapter_name=adapter_name)
    if expected.keys() != found.keys():
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise ValueError(
            f"LoRA {path} has other target modules than the adapter: expected {len(expected)} tensors, found "
            f"{len(found)}; missing {missing[:2]}, not expected {extra[:2]}."
        )
    if other := [name for name in found if found[name].shape != expected[name].shape]:
        raise ValueError(
            f"LoRA {path} does not fit the adapter: {other[0]} has shape {tuple(found[other[0]].shape)}, expected "
            f"{tuple(expected[other[0]].shape)}."
        )
    with torch.no_grad():
        for name, weight in found.items():
            expected[name].copy_(weight)


def register_lora_hooks(
    accelerator: Accelerator,
    unet: torch.nn.Module,
    save: Callable[[Any, str], object] = save_lora,
    load: Callable[[Any, str], object] = load_lora,
) -> None:
    """Makes `accelerator.save_state` / `load_state` store the U-Net's LoRA in place of the whole U-Net.

    Call it after `accelerator.prepare`. Models other than `unet` are stored by accelerate as usual. `save` and `load`
    take the U-Net, out of its parallel wrapper, and a folder.
    """
    unet = accelerator.unwrap_model(unet)

    def position(models: list) -> int:
        return next(i for i, model in enumerate(models) if accelerator.unwrap_model(model) is unet)

    def save_hook(models: list, weights: list, output_dir: str) -> None:
        with full_weights(accelerator, unet):
            if accelerator.is_main_process:
                save(unet, output_dir)
        if weights:  # of DeepSpeed and FSDP, accelerate has written the weights by now
            weights.pop(position(models))  # what stays in the list is written by accelerate

    def load_hook(models: list, input_dir: str) -> None:
        if models:
            models.pop(position(models))
        with full_weights(accelerator, unet):  # of DeepSpeed and FSDP, accelerate has read them: this is the check
            load(unet, input_dir)

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)
