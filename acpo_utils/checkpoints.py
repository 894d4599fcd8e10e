"""LoRA files and training checkpoints: written under a temporary name and renamed, checked before they are read."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from acpo_utils.files import one_line


LORA_NAME = "pytorch_lora_weights.safetensors"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` (same suffix); renamed to `path` on success, removed on an error.

    A reader therefore sees the old file or the whole new one, never a half. Example:
    `with atomic_write("metrics.json") as temporary: temporary.write_text(json.dumps(metrics))`
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_lora(unet: torch.nn.Module, output_dir: str | Path) -> Path:
    """Writes the U-Net's "default" adapter, in fp32 and with its rank and alpha, for `load_lora_weights`.

    Returns the file `output_dir/pytorch_lora_weights.safetensors`. Two choices that are easily made wrong: the PEFT
    names are kept, since diffusers' `convert_state_dict_to_diffusers` renames only to_q, to_k, to_v and to_out and
    the loader then drops every other layer in silence; and the adapter's configuration is stored as metadata, since
    otherwise alpha is taken to be the rank when the file is loaded.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    layers = {name: weight.detach().float().cpu() for name, weight in get_peft_model_state_dict(unet).items()}
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


def load_lora(unet: torch.nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Loads a LoRA file or folder into the adapter that `unet` already has, in the adapter's own dtype.

    Raises ValueError if the file is missing or damaged, belongs to another U-Net, or has another rank, alpha or set
    of layers than the adapter; nothing is loaded then.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

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
    expected = get_peft_model_state_dict(unet, adapter_name=adapter_name)
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
    set_peft_model_state_dict(unet, found, adapter_name=adapter_name)


def register_lora_hooks(
    accelerator, unet: torch.nn.Module, save: Callable = save_lora, load: Callable = load_lora
) -> None:
    """Makes `accelerator.save_state` / `load_state` store the U-Net's LoRA in place of the whole U-Net.

    Call it after `accelerator.prepare`. Models other than `unet` are stored by accelerate as usual. `save` and `load`
    take the U-Net, out of its parallel wrapper, and a folder.
    """
    unet = accelerator.unwrap_model(unet)

    def position(models: list) -> int:
        return next(i for i, model in enumerate(models) if accelerator.unwrap_model(model) is unet)

    def save_hook(models: list, weights: list, output_dir: str) -> None:
        if accelerator.is_main_process:
            save(unet, output_dir)
        weights.pop(position(models))  # what stays in the list is written by accelerate

    def load_hook(models: list, input_dir: str) -> None:
        models.pop(position(models))
        load(unet, input_dir)

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


def checkpoint_step(path: str | Path) -> int:
    """The number in `checkpoint-N`. Raises ValueError for any other name."""
    prefix, _, step = Path(path).name.partition("-")
    if prefix != "checkpoint" or not step.isdecimal():
        raise ValueError(f"Expected a folder named checkpoint-N, found {path}.")
    return int(step)


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """The finished `checkpoint-N` folders, oldest first; folders still called `.tmp` are not among them."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return sorted((path for path in folders if path.name[len("checkpoint-") :].isdecimal()), key=checkpoint_step)


def save_checkpoint(accelerator, output_dir: str | Path, step: int, total_limit: int | None = None) -> Path:
    """Writes `output_dir/checkpoint-{step}` and then removes the oldest ones beyond `total_limit`.

    To be called by every process: each one stores its own random state. The folder is renamed once all of it is
    written, and older ones go only after that, so that a kill at any moment leaves a complete checkpoint.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    temporary = final.with_name(f"{final.name}.tmp")
    if accelerator.is_main_process:
        for leftover in Path(output_dir).glob("checkpoint-*.tmp"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if final.exists():  # a run that was resumed from an older checkpoint writes it again
            os.replace(final, final.with_name(f"{final.name}.old.tmp"))
        os.replace(temporary, final)
        shutil.rmtree(final.with_name(f"{final.name}.old.tmp"), ignore_errors=True)
        if total_limit is not None:
            others = [path for path in _checkpoints(output_dir) if path != final]
            for path in others[: max(len(others) - (total_limit - 1), 0)]:
                shutil.rmtree(path)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None, num_processes: int = 1) -> Path | None:
    """The checked checkpoint folder to resume from, or None if `resume_from_checkpoint` is None.

    `resume_from_checkpoint` is "latest" (the highest checkpoint-N of `output_dir`), the name of a folder in
    `output_dir`, or a path. Raises ValueError if there is none, or if a file of it is missing or damaged: a run that
    was asked to resume never starts anew in silence. A new run may not begin among the checkpoints of an older one
    either: a later "latest" could mean one of those.
    """
    if resume_from_checkpoint is None:
        if leftovers := _checkpoints(output_dir):
            raise ValueError(
                f"--output_dir {output_dir} holds {leftovers[-1].name} of an earlier run: go on with it by "
                "--resume_from_checkpoint latest, or choose another --output_dir for a new run."
            )
        return None
    if resume_from_checkpoint == "latest":
        if not (candidates := _checkpoints(output_dir)):
            raise ValueError(
                f"--resume_from_checkpoint latest: expected checkpoint-N folders in {output_dir}, found none. "
                "Leave the flag out to start a new run."
            )
        path = candidates[-1]
    else:
        inside, path = Path(output_dir) / resume_from_checkpoint, Path(resume_from_checkpoint)
        path = inside if inside.is_dir() else path
        if not path.is_dir():
            raise ValueError(f"--resume_from_checkpoint: expected the folder {inside} or {path}, found neither.")
    checkpoint_step(path)

    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        if not (path / name).is_file():
            raise ValueError(f"Checkpoint {path} is incomplete: {name} is missing. Resume from another one.")
    if (written_by := len(list(path.glob("random_states_*.pkl")))) != num_processes:
        raise ValueError(
            f"Checkpoint {path} is of {written_by} process(es), this run has {num_processes}: its place in the data and in "
            f"the schedule would be wrong. Resume with --num_processes {written_by}, or start anew from its weights."
        )
    if not (weights := sorted(path.glob("*.safetensors"))):
        raise ValueError(f"Checkpoint {path} is incomplete: it holds no .safetensors file. Resume from another one.")
    for file in [*weights, *sorted(path.glob("*.bin")), *sorted(path.glob("*.pkl")), *sorted(path.glob("*.pt"))]:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            else:  # torch.save writes a zip archive; its checksums are tested without unpickling anything
                with zipfile.ZipFile(file) as archive:
                    if damaged := archive.testzip():
                        raise zipfile.BadZipFile(f"checksum of {damaged}")
        except Exception as error:  # zipfile passes on what its decompressors, and the names in a damaged list, raise
            raise ValueError(
                f"Checkpoint {path} is damaged: {file.name} cannot be read ({one_line(error)}). Resume from another one."
            ) from error
    return path


def load_strictly(from_pretrained: Callable, path: str, **kwargs):
    """What `from_pretrained` of a diffusers model reads in `path`; safetensors only, and no tensor left out.

    diffusers itself goes on to a pickle, and leaves a missing tensor uninitialised with no more than a line in the log.
    Raises ValueError if a tensor is missing, of another shape, or does not belong.
    """
    kwargs = {"use_safetensors": True} | kwargs
    model, info = from_pretrained(path, output_loading_info=True, **kwargs)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind) or [])):
            raise ValueError(
                f"The weights in {path} do not fit its config.json: {len(keys)} {kind.replace('_', ' ')}, "
                f"e.g. {', '.join(keys[:3])}. Save the evaluator again or get an undamaged copy."
            )
    return model
