"""How every training run begins, is resumed and survives a step that went wrong: the same in all scripts."""

import json
import logging
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from torchvision.utils import save_image

from acpo_utils.checkpoints import find_checkpoint
from acpo_utils.files import atomic_write
from acpo_utils.sharding import configure_sharding
from acpo_utils.training.run_state import RunState


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
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint, accelerator)
    run = RunState(accelerator, args, checkpoint)
    try:
        with atomic_write(Path(args.output_dir, "args.json")) as temporary:
            temporary.write_text(json.dumps({k: v for k, v in vars(args).items() if k != "hub_token"}, indent=2))
    except OSError as error:
        raise ValueError(f"--output_dir {args.output_dir} cannot be written to: {error.strerror}") from error
    return accelerator, run


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
