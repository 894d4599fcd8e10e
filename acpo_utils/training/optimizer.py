"""The optimizer and its schedule, by the flags that diffusers' scripts have for them."""

import torch
from diffusers.optimization import get_scheduler


def build_optimizer(parameters, accelerator, args, learning_rate: float, num_training_steps: int):
    """AdamW with --adam_beta1 and so on, with 8-bit states by --use_8bit_adam, and the schedule --lr_scheduler.

    Args:
        parameters: a list of parameters, or of groups, whose own options count before the flags.
        accelerator: a prepared schedule is advanced by each of its processes, hence so many times its length.
        args: the script's. learning_rate: of what has none of its own. num_training_steps: of the schedule.
    Raises:
        ImportError: for --use_8bit_adam without bitsandbytes.
    """
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError(f"--use_8bit_adam needs bitsandbytes: pip install bitsandbytes ({error})") from error
        optimizer_class = bitsandbytes.optim.AdamW8bit
    optimizer = optimizer_class(
        parameters,
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=num_training_steps * accelerator.num_processes,
    )
    return optimizer, lr_scheduler
