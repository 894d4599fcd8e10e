"""How every training run begins, is resumed and survives a step that went wrong: the same in all four scripts."""

import json
import logging
import math
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, set_seed

from acpo_utils.checkpoints import checkpoint_step
from acpo_utils.files import atomic_write
from acpo_utils.sharding import configure_sharding, load_state


logger = get_logger(__name__, log_level="INFO")
SKIPPED_IN_A_ROW = 10


def start_run(args, sharding: tuple[DistributedType, ...] = ()) -> Accelerator:
    """The accelerator, the log's form, the seed, and OUTPUT_DIR/args.json, before anything is loaded.

    Args:
        args: a training script's, by the names that diffusers uses.
        sharding: DeepSpeed, FSDP: what the script is made for (`acpo_utils.sharding`).

    Raises:
        ValueError: for a way of launching that the script is not made for, for processes that would train apart, or an
            --output_dir that cannot be written to.
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
        with atomic_write(Path(args.output_dir, "args.json")) as temporary:
            temporary.write_text(json.dumps({k: v for k, v in vars(args).items() if k != "hub_token"}, indent=2))
    except OSError as error:
        raise ValueError(f"--output_dir {args.output_dir} cannot be written to: {error.strerror}") from error
    return accelerator


def _check_processes(accelerator) -> None:
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, and each would train alone: without GPUs set ACCELERATE_USE_CPU=true."
        )


def resume(accelerator, checkpoint: Path | None) -> int:
    """Loads `checkpoint`, one that `find_checkpoint` returned, and returns its step; 0 if there is none.

    Raises:
        ValueError: if it is of a run with other models, another split of a step into batches, or other options.
    """
    if checkpoint is None:
        return 0
    try:
        load_state(accelerator, checkpoint)
    except RuntimeError as error:
        raise ValueError(
            f"{checkpoint} is of another model or of other options (--anchor_budget, --balance_steps, "
            f"--eval_prompts): {' '.join(str(error).split())[:200]}"
        ) from error
    step = checkpoint_step(checkpoint)
    logger.info(f"Resuming from {checkpoint} at step {step}")
    return step


class RunState:
    """What a checkpoint keeps of the run itself: how a step is split, and the steps that were skipped.

    Register it for checkpointing. The place in the data is the step times the samples of a step, so that a run goes on
    with the split that it began with.
    """

    def __init__(self, accelerator, train_batch_size: int):
        self.split = {
            "train_batch_size": train_batch_size,
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        }
        self.skipped_steps = self.skipped_in_a_row = 0

    def clip(self, accelerator, optimizer, parameters: list, max_grad_norm: float, step: int) -> float:
        """Clips the gradients of `step` and returns their norm; they are dropped, and counted, if it is not finite.

        Raises FloatingPointError at the tenth such step in a row.
        """
        norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm))  # DeepSpeed gives no tensor
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            return norm
        # fp16's loss scaler skips the step itself, and must see it in order to lower its scale.
        if accelerator.scaler is None:
            optimizer.zero_grad()
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradient was not finite in ten steps in a row, up to step {step}: lower --learning_rate, and in "
                "stage 2 --quality_weight, or use bf16 in place of fp16. Checkpoints in "
                f"{accelerator.project_dir} are as they were."
            )
        return norm

    def state_dict(self) -> dict:
        return self.split | {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict) -> None:
        for name, value in self.split.items():
            if state[name] != value:
                raise ValueError(
                    f"The checkpoint is of --{name} {state[name]}, this run has {value}: its place in the data would be "
                    f"wrong. Resume with --{name} {state[name]}, or start a new run from its weights."
                )
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]


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
    """`images` (N, 3, H, W) in [0, 1] on the CPU to TensorBoard and wandb, where they are in use."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images(name, images.numpy(), step)
        if tracker.name == "wandb":
            tracker.log_images({name: [image.permute(1, 2, 0).numpy() for image in images]}, step=step)
