"""A denoiser whose linear layers are in 4 or 8 bits (bitsandbytes), with a LoRA in full precision over it: QLoRA, Dettmers et
al. (2023). What is asked for, its size, and what the estimate of memory counts in its place."""

import inspect
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers.quantizers.quantization_config import BitsAndBytesConfig

from acpo_utils.files import one_line


FLAG = "--bnb_quantization_config_path"
# bitsandbytes' own sizes: weights for each of the first quantisation's constants, and of these for each of the second's.
BLOCK, DOUBLE_BLOCK = 64, 256


def read_quantization_config(path: str | Path) -> dict:
    """The keywords of diffusers' BitsAndBytesConfig in a JSON file. Raises ValueError, in one line, for anything else."""
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{FLAG}: expected a JSON file, {path} cannot be read: {one_line(error)}") from error
    known = {*inspect.signature(BitsAndBytesConfig).parameters, *BitsAndBytesConfig._exclude_attributes_at_init}
    unknown = sorted(set(config) - known) if isinstance(config, dict) else [type(config).__name__]
    if unknown:
        raise ValueError(
            f"{FLAG} {path}: expected an object of BitsAndBytesConfig's keywords, found {one_line(unknown[0])}"
        )
    bits = [config.get(f"load_in_{number}bit", False) for number in (4, 8)]
    if bits not in ([True, False], [False, True]):
        raise ValueError(
            f"{FLAG} {path}: expected one of load_in_4bit and load_in_8bit to be true, found {bits[0]} and {bits[1]}"
        )
    return config


def check_quantization(path: str | Path | None) -> None:
    """Whether a base can be quantised as the file says, if there is one, and here. Raises ValueError or ImportError, in one
    line."""
    if path is None:
        return
    read_quantization_config(path)
    if find_spec("bitsandbytes") is None:
        raise ImportError(f"{FLAG} needs bitsandbytes: pip install bitsandbytes")
    if not gpu_is_there():
        raise ValueError(f"{FLAG} needs a GPU, and none was found: leave it out")
    build_quantization_config(path, torch.float32)


def gpu_is_there() -> bool:
    """One of those for which diffusers quantises both to 4 and to 8 bits."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def build_quantization_config(path: str | Path, weight_dtype: torch.dtype) -> BitsAndBytesConfig:
    """As diffusers' training scripts read it: a 4-bit base is computed with in `weight_dtype`, whatever the file says."""
    config = read_quantization_config(path)
    if config.get("load_in_4bit"):
        config["bnb_4bit_compute_dtype"] = weight_dtype
    try:
        return BitsAndBytesConfig(**config)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{FLAG} {path}: {one_line(error)}") from error


def loaded_quantization(model: torch.nn.Module) -> dict | None:
    """The keywords by which a model of diffusers was quantised by bitsandbytes when it was loaded; None if it was not."""
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return None
    return model.hf_quantizer.quantization_config.to_dict()


def in_full_precision(model: torch.nn.Module) -> torch.nn.Module:
    """A quantised model with its LoRA as one that was not quantised, on the meta device: for what is told by shapes alone.
    Any other model as it is."""
    if loaded_quantization(model) is None:
        return model
    config = {name: value for name, value in model.config.items() if name != "quantization_config"}
    with torch.device("meta"):
        whole = type(model).from_config(config).requires_grad_(False)
        whole.add_adapter(model.peft_config["default"])
    return whole


def quantized_layers(model: torch.nn.Module, config: dict | None) -> list[torch.nn.Linear]:
    """Those of `model`, which is not quantised and may have a LoRA, that diffusers would quantise by `config`.

    All linear ones that the model does not keep in fp32, and that `llm_int8_skip_modules` names neither by the last part of
    their name nor with a module around them.
    """
    if config is None:
        return []
    skipped = [*(config.get("llm_int8_skip_modules") or []), *(getattr(model, "_keep_in_fp32_modules", None) or [])]

    def is_skipped(name: str) -> bool:
        return name.rpartition(".")[2] in skipped or any(f"{key}." in name or key == name for key in skipped)

    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not module.weight.requires_grad
        and not is_skipped(name.removesuffix(".base_layer"))
    ]


def largest_layer(model: torch.nn.Module, config: dict | None) -> int:
    """Weights of the largest layer that is quantised: so many exist in the computation's dtype at a time."""
    return max((layer.weight.numel() for layer in quantized_layers(model, config)), default=0)


def frozen_bytes(model: torch.nn.Module, config: dict | None, width: int) -> float:
    """Bytes of the frozen parameters of `model`, which is not quantised: at `width` each, or quantised as `config` says.

    Then these are the quantised weights with their constants, and the others at `width`.
    """
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    if config is None:
        return width * frozen
    layers = quantized_layers(model, config)
    weights = sum(layer.weight.numel() for layer in layers)
    others = width * (frozen - weights)
    if config.get("load_in_8bit"):
        return others + weights + 4 * sum(layer.out_features for layer in layers)
    constants = weights / BLOCK
    double = config.get("bnb_4bit_use_double_quant")
    return others + weights / 2 + (constants + 4 * constants / DOUBLE_BLOCK if double else 4 * constants)
