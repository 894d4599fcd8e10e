"""A LoRA's file, as `load_lora_weights` of diffusers reads it: written whole or not at all, checked before it is loaded."""

import difflib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import safe_open
from safetensors.torch import load_file

from acpo_utils.files import one_line
from acpo_utils.sharding import full_weights


LORA_NAME = "pytorch_lora_weights.safetensors"
# kohya's files write an underscore for every dot in a layer's name. These parts of Stable Diffusion's have their own.
KOHYA_NAMES = re.compile(
    "(?:down|up|transformer)_blocks|mid_block|time_emb_proj|(?:time|class|add)_embedding|linear_[12]|"
    "conv_(?:in|out|shortcut)|proj_(?:in|out)|to_(?:q|k|v|out)|[^_]+"
)
KOHYA_MATRICES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
LORA_LAYERS = (torch.nn.Linear, torch.nn.Conv2d)  # what peft gives a LoRA in a U-Net of diffusers


def save_lora(unet: Any, output_dir: str | Path, pipeline_class: type | None = None) -> Path:
    """Writes the "default" adapter, in fp32 and with its rank and alpha, for `load_lora_weights` of `pipeline_class`.

    Returns the file `output_dir/pytorch_lora_weights.safetensors`. Two choices that are easily made wrong: the PEFT
    names are kept, since diffusers' `convert_state_dict_to_diffusers` renames only to_q, to_k, to_v and to_out and
    the loader then drops every other layer in silence; and the adapter's configuration is stored as metadata, since
    otherwise alpha is taken to be the rank when the file is loaded.
    """
    weights = get_peft_model_state_dict(unet, dict(unet.named_parameters()))
    layers = {name: weight.detach().float().cpu() for name, weight in weights.items()}
    return write_lora(layers, unet.peft_config["default"], Path(output_dir) / LORA_NAME, pipeline_class)


def _family(pipeline_class: type | None) -> tuple[Any, str]:
    """The pipeline's class, StableDiffusionPipeline if None, and how the names in its LoRA begin: the part that is trained."""
    from diffusers import StableDiffusionPipeline

    return pipeline_class or StableDiffusionPipeline, getattr(pipeline_class, "transformer_name", "unet")


def write_lora(
    weights: dict[str, torch.Tensor], lora_config: LoraConfig, path: Path, pipeline_class: type | None = None
) -> Path:
    """Writes a LoRA, under PEFT names (`....lora_A.weight`), to the .safetensors file `path`, which it returns."""
    pipeline, prefix = _family(pipeline_class)
    config = lora_config.to_dict() | {"target_modules": sorted(lora_config.target_modules)}  # a set's order is chance
    layers = {f"{prefix}_lora_layers": weights, f"{prefix}_lora_adapter_metadata": config}
    temporary = path.parent / f".lora.{os.getpid()}.tmp"
    try:
        pipeline.save_lora_weights(temporary, weight_name=path.name, **layers)
        os.replace(temporary / path.name, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _from_kohya(weights: dict[str, torch.Tensor], file: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """kohya's names as PEFT's, and each layer's alpha. diffusers reads conv_in, conv_out and time_embedding from 0.39 on."""
    converted, alphas = {}, {}
    for name, weight in weights.items():
        layer, _, matrix = name.removeprefix("lora_unet_").partition(".")
        layer = ".".join(KOHYA_NAMES.findall(layer))
        known = name.startswith("lora_unet_") and not layer.startswith(("input.", "middle.", "output."))
        if known and matrix in KOHYA_MATRICES:
            converted[f"{layer}.{KOHYA_MATRICES[matrix]}"] = weight
        elif known and matrix == "alpha" and weight.numel() == 1 and not weight.is_complex():
            alphas[layer] = float(weight)
        else:
            raise ValueError(
                f"LoRA file {file}: expected lora_down.weight, lora_up.weight and alpha of lora_unet_* layers alone, in "
                f"diffusers' names (down_blocks), found {one_line(name)}."
            )
    return converted, alphas


def read_lora(path: str | Path, pipeline_class: type | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a LoRA file or folder under PEFT names (`....lora_A.weight`), and its `read_lora_config`.

    The file's own names are PEFT's, older ones of diffusers, or kohya's. Raises ValueError as `read_lora_config`.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    pipeline, prefix = _family(pipeline_class)
    file = Path(path) / LORA_NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"LoRA file not found: {file}. Expected a .safetensors file or a folder with {LORA_NAME}.")
    try:
        weights = load_file(file)
        with safe_open(file, framework="pt") as handle:
            adapter = json.loads((handle.metadata() or {}).get("lora_adapter_metadata", "{}"))
        if not isinstance(adapter, dict):
            raise ValueError("lora_adapter_metadata is no object")
        is_kohya = any(name.startswith("lora_unet_") for name in weights)
        if not is_kohya:
            read = pipeline.lora_state_dict(weights)
            weights = read[0] if isinstance(read, tuple) else read  # some pipelines return kohya's alphas, too
    except Exception as error:  # diffusers, converting other formats, raises whatever a name or a tensor leads to
        raise ValueError(f"LoRA file {file} is damaged or in no known format: {one_line(error)}") from error

    alphas: dict[str, float] = {}
    if is_kohya:
        weights, alphas = _from_kohya(weights, file)
        adapter = {}
    else:
        other = sorted({name.split(".")[0] for name in weights if not name.startswith(f"{prefix}.")})
        if other or not weights:
            found = one_line(", ".join(other)) or "none"
            raise ValueError(f"LoRA file {file}: expected only tensors named {prefix}.*, found {found}.")
        weights = {name.removeprefix(f"{prefix}."): value for name, value in weights.items()}
        weights = convert_unet_state_dict_to_peft(weights) if prefix == "unet" else weights

    layers = {name.rpartition(".lora_")[0] for name in weights} | alphas.keys()
    complete = {f"{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"}
    if differing := sorted(complete ^ weights.keys()):
        raise ValueError(
            f"LoRA file {file}: expected lora_A.weight and lora_B.weight of every layer, in kohya's names lora_down and "
            f"lora_up; missing or not one of them: {one_line(differing[0])}."
        )
    # A layer's rank is the number of rows of lora_A and of columns of lora_B.
    ranks = {(*weight.shape, 0, 0)[name.endswith(".lora_B.weight")] for name, weight in weights.items()}
    if alphas:  # where a layer has none, and in a file without any, it is the rank
        rank_as_alpha = {layer: float((*weights[f"{layer}.lora_A.weight"].shape, 0)[0]) for layer in layers}
        alphas = rank_as_alpha | alphas
    found_alphas = sorted(set(alphas.values()))
    config = {n.removeprefix(f"{prefix}."): value for n, value in adapter.items() if n.startswith(f"{prefix}.")}
    unsupported = [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(name)]
    if unsupported or len(ranks) != 1 or ranks == {0} or len(found_alphas) > 1:
        raise ValueError(
            f"LoRA file {file}: expected one rank and one alpha for all layers, found ranks {sorted(ranks)}"
            f"{f', alphas {found_alphas}' if alphas else ''}{f', {unsupported}' if unsupported else ''}."
        )
    (rank,) = ranks
    targets = config.get("target_modules") or layers
    alpha = config.get("lora_alpha", found_alphas[0] if alphas else rank)
    # PEFT takes a string for a regular expression.
    listed = isinstance(targets, (list, set)) and all(isinstance(target, str) for target in targets)
    if not (listed or isinstance(targets, str)) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e300:
        raise ValueError(
            f"LoRA file {file}: expected a number for lora_alpha and names for target_modules, found {alpha!r} and "
            f"{targets!r}."
        )
    targets = sorted(targets) if listed else targets
    return weights, {"rank": rank, "alpha": alpha, "target_modules": targets}


def read_lora_config(path: str | Path, pipeline_class: type | None = None) -> dict:
    """`rank`, `alpha` and `target_modules` of a LoRA file or folder, to create the adapter it is loaded into.

    A file without metadata has alpha = rank (as `load_lora_weights` takes it) and lists its layers by full name.
    Raises ValueError if the file is missing or damaged, mixes ranks or alphas, or is not of the trained part alone.
    """
    return read_lora(path, pipeline_class)[1]


def load_lora(unet: Any, path: str | Path, adapter_name: str = "default", pipeline_class: type | None = None) -> None:
    """Loads a LoRA file or folder into the adapter that `unet` already has, in the adapter's own dtype.

    Raises ValueError if the file is missing or damaged, belongs to another U-Net, or has another rank, alpha or set
    of layers than the adapter; nothing is loaded then.
    """
    found, config = read_lora(path, pipeline_class)
    modules = dict(unet.named_modules())
    for name, weight in found.items():
        layer, _, matrix = name.partition(".lora_")
        module = getattr(modules.get(layer), "base_layer", modules.get(layer))
        base = getattr(module, "weight", None)  # () of a block or an activation; of 4 bits, packed into another shape
        shape = tuple(getattr(getattr(base, "quant_state", base), "shape", ()))
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


def _target_modules(unet: torch.nn.Module, names: list[str] | str) -> dict[str, torch.nn.Module]:
    """The modules that peft would give an adapter with these `target_modules`; a string is a regular expression."""
    config = LoraConfig(target_modules=names)
    return {name: module for name, module in unet.named_modules() if name and check_target_module_exists(config, name)}


def check_target_modules(unet: torch.nn.Module, target_modules: list[str]) -> None:
    """Each of `target_modules` names layers that can take a LoRA, by name or its end; `unet` has no adapter yet.

    Raises ValueError for those that do not, with what they may have meant. peft itself leaves out a name that matches
    nothing as long as another one does.
    """
    layers = [name.split(".") for name, module in unet.named_modules() if isinstance(module, LORA_LAYERS)]
    ends = {".".join(parts[start:]) for parts in layers for start in range(len(parts))}
    wrong = []
    for name in target_modules:
        matched = _target_modules(unet, [name])
        unfit = [(match, module) for match, module in matched.items() if not isinstance(module, LORA_LAYERS)]
        if unfit or not matched:
            found = f"{unfit[0][0]} ({type(unfit[0][1]).__name__})" if unfit else "nothing"
            close = difflib.get_close_matches(name, ends - {name}, n=1)
            wrong.append(f"{name!r} matches {found}{f', did you mean {close[0]!r}?' if close else ''}")
    if wrong:
        raise ValueError(
            f"--lora_target_modules: expected names of layers that take a LoRA, found: {'; '.join(wrong)}."
        )


def check_lora_options(
    unet: torch.nn.Module,
    saved: dict,
    *,
    rank: int | None = None,
    lora_alpha: float | None = None,
    target_modules: list[str] | None = None,
) -> None:
    """What was given beside --lora_path agrees with `saved`, the file's `read_lora_config`; None was not given.

    Target modules agree if they name the same layers of `unet`, which has no adapter yet. Raises ValueError with both.
    """
    for flag, given, value in (("--rank", rank, saved["rank"]), ("--lora_alpha", lora_alpha, saved["alpha"])):
        if given is not None and given != value:
            raise ValueError(
                f"--lora_path has {flag} {value:g}, found {flag} {given:g}: leave it out, it is the file's."
            )
    if target_modules is not None:
        given_layers = _target_modules(unet, target_modules).keys()
        saved_layers = _target_modules(unet, saved["target_modules"]).keys()
        if given_layers != saved_layers:
            only = sorted(given_layers ^ saved_layers)
            raise ValueError(
                f"--lora_path has {len(saved_layers)} layers, --lora_target_modules {','.join(target_modules)} names "
                f"{len(given_layers)}; in one of them only: {only[0]}. Leave it out, they are the file's."
            )


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
