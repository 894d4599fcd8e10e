"""How every training run begins, is resumed and survives a step that went wrong: the same in all scripts."""

import ctypes
import itertools
import json
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from filelock import FileLock, Timeout
from torchvision.utils import save_image
from tqdm.auto import tqdm

from acpo_utils.checkpoints import find_checkpoint
from acpo_utils.files import atomic_write
from acpo_utils.sharding import configure_sharding
from acpo_utils.training.hub import check_login
from acpo_utils.training.run_state import RunState


logger = logging.getLogger(__name__)
LOCKS: dict[str, FileLock] = {}  # of this process
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# What a run leaves in its folder, beside checkpoints and logs, which other rules are for.
RESULTS = (
    "args.json",
    "metrics.json",
    "README.md",
    "pytorch_lora_weights.safetensors",
    "comparison.png",
    "samples.png",
    "scatter*.png",
    "validation",
    "samples",
    "best",
    "stage-*",
)


def start_run(args, sharding: tuple[DistributedType, ...] = ()) -> tuple[Accelerator, RunState]:
    """The accelerator, the log's form, the seed, the checkpoint to go on from, and OUTPUT_DIR/args.json.

    Nothing is loaded before it. Of a run that is resumed the settings are compared with the checkpoint's first, so that
    args.json is of a run that really was.

    Args:
        args: a training script's, by the names that diffusers uses.
        sharding: DeepSpeed, FSDP: what the script is made for (`acpo_utils.sharding`).

    Raises:
        ValueError: for a way of launching that the script is not made for, for processes that would train apart, for an
            --output_dir that cannot be written to, and as `find_checkpoint` and `RunState` do.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
        # The others wait while the first process samples and scores, which may take longer than NCCL's ten minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    _check_request(accelerator, args)
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps  # not DeepSpeed's launcher's
    configure_sharding(accelerator, args, sharding)
    _check_processes(accelerator)
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%H:%M:%S", level=logging.INFO
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request to the hub
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    try:
        os.makedirs(args.output_dir, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {args.output_dir} cannot be written to: {error.strerror}") from error
    if accelerator.is_main_process:
        _lock(Path(args.output_dir))
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint, accelerator)
    run = RunState(accelerator, args, checkpoint)
    if checkpoint is None and accelerator.is_main_process:
        _set_aside(Path(args.output_dir), args)
    try:
        with atomic_write(Path(args.output_dir, "args.json")) as temporary:
            temporary.write_text(json.dumps({k: v for k, v in vars(args).items() if k != "hub_token"}, indent=2))
    except OSError as error:
        raise ValueError(f"--output_dir {args.output_dir} cannot be written to: {error.strerror}") from error
    return accelerator, run


def _check_request(accelerator, args) -> None:
    """What would fail after hours of training is refused now."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU, and none was found: use bf16, or no.")
    if args.report_to not in ("none", "all") and not accelerator.log_with:
        raise ValueError(
            f"--report_to {args.report_to} is not installed: pip install {args.report_to}, or give another."
        )
    if args.push_to_hub and accelerator.is_main_process:
        check_login(args.hub_token)


def _lock(output_dir: Path) -> None:
    """Until this process ends, however it ends, no other run can begin in `output_dir`."""
    lock = FileLock(output_dir.resolve() / ".lock")
    if lock.lock_file in LOCKS:
        return
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"--output_dir {output_dir}: another run is writing there now. Choose another one."
        ) from error
    except (OSError, NotImplementedError) as error:  # a file system that knows no locks
        logger.warning(f"--output_dir {output_dir} cannot be locked ({error}): let no other run write there.")
    LOCKS[lock.lock_file] = lock


def _set_aside(output_dir: Path, args) -> None:
    """The results of an earlier run go to `output_dir/previous-N`, so that they do not stand beside the new one's."""
    if not (output_dir / "args.json").is_file():  # whatever lies there is of no run
        return
    given = [value for name, value in vars(args).items() if name != "output_dir"]
    inputs = [value for values in given for value in (values if isinstance(values, list) else [values])]
    kept = {Path(value.rpartition(":")[2]).resolve() for value in inputs if isinstance(value, str)}
    if output_dir.resolve() in kept:  # the run begins from what lies there
        return
    found = sorted(path for pattern in RESULTS for path in output_dir.glob(pattern) if path.resolve() not in kept)
    if not found:
        return
    target = next(folder for n in itertools.count(1) if not (folder := output_dir / f"previous-{n}").exists())
    target.mkdir()
    for path in found:
        os.replace(path, target / path.name)
    logger.warning(
        f"{output_dir} holds the results of an earlier run ({found[0].name}, ...): they are now in {target}."
    )


def _check_processes(accelerator) -> None:
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, and each would train alone: without GPUs set ACCELERATE_USE_CPU=true."
        )


def use_all_cpus() -> None:
    """Lets torch use every core that this process may use: `accelerate launch` gives a single process one thread."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux; elsewhere a process may use all of them
    torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count())
    if sys.platform == "linux":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """glibc gives large blocks back to the kernel, which clears them again a moment later: each step needs the same ones."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def progress_bar(first_step: int, num_steps: int, accelerator) -> tqdm:
    """Over the steps from `first_step` of so many, shown by one process of each machine."""
    steps = range(first_step, num_steps)
    return tqdm(steps, initial=first_step, total=num_steps, disable=not accelerator.is_local_main_process)


def mean_terms(accelerator, terms: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean of each of a step's terms over its elements and the processes, which exchange them all at once.

    `late_timesteps` are left out: they say where the others were taken. To be called by every process.
    """
    names = [name for name in terms if name != "late_timesteps"]
    means = torch.stack([terms[name].detach().float().mean() for name in names])
    return dict(zip(names, accelerator.reduce(means, "mean").tolist()))


def log_images(accelerator, name: str, images: torch.Tensor, step: int) -> None:
    """`images` (N, 3, H, W) in [0, 1] on the CPU to OUTPUT_DIR/NAME/step-N.png, and to TensorBoard and wandb if in use."""
    with atomic_write(Path(accelerator.project_dir, name, f"step-{step}.png")) as temporary:
        save_image(images, temporary)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images(name, images.numpy(), step)
        if tracker.name == "wandb":
            tracker.log_images({name: [image.permute(1, 2, 0).numpy() for image in images]}, step=step)
