"""Training checkpoints: written under a temporary name and renamed, checked before they are read."""

import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import DistributedType
from safetensors import safe_open

from acpo_utils.files import one_line
from acpo_utils.sharding import SHARDED_STATE, check_deepspeed_pickle, save_state


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
    save_state(accelerator, temporary)
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


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None, accelerator=None) -> Path | None:
    """The checked checkpoint folder to resume from, or None if `resume_from_checkpoint` is None.

    `resume_from_checkpoint` is "latest" (the highest checkpoint-N of `output_dir`), the name of a folder in
    `output_dir`, or a path. Raises ValueError if there is none, or if a file of it is missing or damaged: a run that
    was asked to resume never starts anew in silence. A new run may not begin among the checkpoints of an older one
    either: a later "latest" could mean one of those. Without an `accelerator` the run is one plain process.
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

    num_processes, kind = (accelerator.num_processes, accelerator.distributed_type) if accelerator else (1, None)
    kind = kind if kind in SHARDED_STATE else None
    written_as = next((k for k, file in SHARDED_STATE.items() if (path / file).exists()), None)
    if written_as != kind:
        names = [k.value if k else "DDP" for k in (written_as, kind)]
        raise ValueError(
            f"Checkpoint {path} is of a run by {names[0]}, this one is by {names[1]}: resume with {names[0]}, or start "
            "anew from its weights."
        )
    for name in ("scheduler.bin", "random_states_0.pkl"):
        if not (path / name).is_file():
            raise ValueError(f"Checkpoint {path} is incomplete: {name} is missing. Resume from another one.")
    if (written_by := len(list(path.glob("random_states_*.pkl")))) != num_processes:
        raise ValueError(
            f"Checkpoint {path} is of {written_by} process(es), this run has {num_processes}: its place in the data and in "
            f"the schedule would be wrong. Resume with --num_processes {written_by}, or start anew from its weights."
        )
    deepspeed = kind == DistributedType.DEEPSPEED
    optimizer_files = "pytorch_model/*_optim_states.pt" if deepspeed else "optimizer.bin"
    if len(list(path.glob(optimizer_files))) < (num_processes if deepspeed else 1):
        raise ValueError(f"Checkpoint {path} is incomplete: {optimizer_files} is missing. Resume from another one.")
    if not (weights := sorted(path.glob("*.safetensors"))) and kind is None:
        raise ValueError(f"Checkpoint {path} is incomplete: it holds no .safetensors file. Resume from another one.")
    pickled = (file for pattern in ("*.bin", "*.pkl", "*.pt") for file in sorted(path.rglob(pattern)))
    for file in [*weights, *pickled]:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            else:  # torch.save writes a zip archive; its checksums are tested without unpickling anything
                with zipfile.ZipFile(file) as archive:
                    if damaged := archive.testzip():
                        raise zipfile.BadZipFile(f"checksum of {damaged}")
                if deepspeed and file.suffix == ".pt":
                    check_deepspeed_pickle(file)
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
