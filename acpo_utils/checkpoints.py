"""Training checkpoints: written under a temporary name and renamed, checked before they are read, and saved on SIGTERM."""

import json
import logging
import os
import shutil
import signal
import sys
import zipfile
from pathlib import Path

from accelerate.utils import DistributedType
from safetensors import safe_open

from acpo_utils.files import one_line
from acpo_utils.sharding import SHARDED_STATE, check_deepspeed_pickle, save_state


logger = logging.getLogger(__name__)
RUN_STATE = "run_state.json"


def is_due(step: int, every: int) -> bool:
    """Whether what is done every so many steps is due after `step`, counted from 1; `every` 0 means never."""
    return every > 0 and step % every == 0


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


def read_run_state(checkpoint: str | Path) -> dict:
    """run_state.json of `checkpoint`: step, settings, and what the run's monitors keep (`acpo_utils.training.run_state`).

    Raises ValueError, in one line, if it is missing (a checkpoint of acpo_utils 0.1 has pickles in its place), damaged, or
    of another step than the folder's name says.
    """
    file = Path(checkpoint, RUN_STATE)
    if not file.is_file():
        raise ValueError(
            f"Checkpoint {checkpoint} has no {RUN_STATE}: it is incomplete, or of acpo_utils 0.1, which kept a run's state "
            "in pickles. Resume from another one, or start a new run from its weights."
        )
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        complete = isinstance(state, dict) and isinstance(state["settings"], dict)
        if not complete or state["step"] != checkpoint_step(checkpoint):
            raise ValueError(f"it is of step {state['step']}" if complete else "expected an object with settings")
    except (ValueError, KeyError, RecursionError) as error:
        raise ValueError(
            f"Checkpoint {checkpoint} is damaged: {RUN_STATE} cannot be read ({one_line(error)}). Resume from another one."
        ) from error
    return state


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None, accelerator=None) -> Path | None:
    """The checked checkpoint folder to resume from, or None if `resume_from_checkpoint` is None.

    `resume_from_checkpoint` is "latest" (the highest checkpoint-N of `output_dir`; without any a new run begins, which is
    said, so that one command serves the first start and every later one), the name of a folder in `output_dir`, or a path.
    Raises ValueError if the one that was named is not there, or if a file of it is missing or damaged. A new run may not
    begin among the checkpoints of an older one either: a later "latest" could mean one of those. Without an
    `accelerator` the run is one plain process.
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
            logger.warning(f"--resume_from_checkpoint latest: no checkpoint-N in {output_dir} yet, a new run begins.")
            return None
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


def catch_signals(accelerator) -> None:
    """From now on SIGTERM, by which schedulers say that a machine is about to be taken away, and Ctrl-C, in any process,
    make `accelerator.check_trigger()` true in all of them, at the same step. A second Ctrl-C ends the process at once."""

    def stop(number: int, frame) -> None:
        accelerator.set_trigger()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            logger.warning("Ctrl-C: a checkpoint is saved after this step. Once more ends the run at once.")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def release_signals() -> None:
    """SIGTERM and Ctrl-C end the process at once again."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def checkpoint_or_stop(accelerator, output_dir: str | Path, step: int, due: bool, total_limit: int | None) -> None:
    """Saves a checkpoint if one is due. After a SIGTERM or Ctrl-C saves one in any case, closes the trackers and exits with
    143, a shell's status for SIGTERM, so that no script takes the run as done. To be called by every process."""
    stopping = accelerator.check_trigger()
    if due or stopping:
        save_checkpoint(accelerator, output_dir, step, total_limit)
    if stopping:
        accelerator.end_training()
        if accelerator.is_main_process:
            logger.warning(
                f"Stopped by a signal after step {step}: --resume_from_checkpoint latest goes on from here."
            )
        sys.exit(128 + signal.SIGTERM)
