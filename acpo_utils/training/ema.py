"""Exponential moving average of trained weights: diffusers' `EMAModel`, kept in checkpoints, put in place to sample."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file


EMA_NAME = "ema.safetensors"


@contextmanager
def ema_weights(ema: EMAModel | None, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, `parameters` have their averages; after it they are what they were. `ema` None changes nothing."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def register_ema_hooks(accelerator, ema: EMAModel) -> None:
    """Makes `accelerator.save_state` / `load_state` store the average too, as `ema.safetensors`.

    Not by `register_for_checkpointing`: accelerate unpickles such objects without restriction.
    """

    def save_hook(models: list, weights: list, output_dir: str) -> None:
        if accelerator.is_main_process:
            tensors = {f"shadow_params.{i}": tensor.contiguous() for i, tensor in enumerate(ema.shadow_params)}
            tensors["optimization_step"] = torch.tensor(ema.optimization_step)
            save_file(tensors, Path(output_dir, EMA_NAME))

    def load_hook(models: list, input_dir: str) -> None:
        if not (file := Path(input_dir, EMA_NAME)).is_file():
            raise ValueError(f"Checkpoint {input_dir} has no {EMA_NAME}: its run was without --use_ema.")
        tensors = load_file(file)
        ema.optimization_step = int(tensors.pop("optimization_step"))
        if len(tensors) != len(ema.shadow_params):
            raise ValueError(f"{file}: expected {len(ema.shadow_params)} tensors, found {len(tensors)}.")
        for i, tensor in enumerate(ema.shadow_params):
            tensor.copy_(tensors[f"shadow_params.{i}"])

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)
