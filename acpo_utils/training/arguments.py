"""What all scripts do with their arguments: the least that each number may be, and the demo's settings from their file."""

import copy
import json
import math
from pathlib import Path

from acpo_utils.evaluators import guide_weights


NEVER = 0  # of what is done every so many steps
AT_LEAST = {
    # how much is trained
    "max_train_steps": 1,
    "num_train_epochs": 1,
    "num_epochs": 1,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "map_learning_rate": 0,
    "head_learning_rate": 0,
    "lr_warmup_steps": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_weight_decay": 0,
    "adam_epsilon": 0,
    "adversarial_epsilon": 0,
    "gradient_norm_weight": 0,
    "max_grad_norm": 0,  # 0: no clipping
    "rank": 1,
    "seed": 0,
    # what, and of what
    "widths": 1,
    "fusion_width": 1,
    "num_crops": 1,
    "eval_num_crops": 1,
    "lock_image_unlocked_groups": 0,
    "lock_text_unlocked_layers": 0,
    "split_seed": 0,
    "resolution": 1,
    "max_sequence_length": 1,
    "max_train_samples": 1,
    "max_validation_samples": 2,
    "max_test_samples": 2,
    "max_robustness_samples": 2,
    "dataloader_num_workers": 0,
    # ACPO
    "tmax": 1,
    "last_steps": 1,
    "quality_weight": 0,
    "anchor_weight": 0,
    "diffusion_weight": 0,
    "guide_perturbation": 0,
    "guide_clean_weight": 0,
    "guide_clean_weight_end": 0,
    "late_every": 1,
    "late_steps": 1,
    "late_backprop_steps": 1,
    "decode_batch_size": 1,
    "decode_size": 1,
    "cfg_normalization": 0,
    "cfg_truncation": 0,
    # what is looked at, and saved
    "validation_steps": NEVER,
    "balance_steps": NEVER,
    "checkpointing_steps": NEVER,
    "save_images_epochs": NEVER,
    "save_model_epochs": NEVER,
    "checkpoints_total_limit": 1,
    "num_validation_images": 0,
    "num_validation_prompts": 0,
    "num_eval_prompts": 0,
    "num_eval_images": 0,
    "eval_batch_size": 1,
    "num_inference_steps": 1,
    "ddpm_num_steps": 1,
    "ddpm_num_inference_steps": 1,
}
ABOVE_ZERO = ("lora_alpha", "anchor_budget", "snr_gamma", "logit_std", "ema_inv_gamma", "ema_power")


def check_numbers(args, **least: float) -> None:
    """Raises ValueError, in one line, if a number among `args`, or one of a list, is too small or not finite.

    Args:
        args: a script's. What is None, or is no flag of the script, is left out.
        least: by name, where a script's flag may be less, or has to be more, than `AT_LEAST` says.
    """
    for name, bound in (AT_LEAST | least).items():
        for value in _numbers(args, name):
            if not (math.isfinite(value) and value >= bound):
                raise ValueError(f"--{name}: expected at least {bound}, found {value}")
    for name in ABOVE_ZERO:
        for value in _numbers(args, name):
            if not 0 < value < math.inf:
                raise ValueError(f"--{name}: expected a number above 0, found {value}")


def _numbers(args, name: str) -> list:
    value = getattr(args, name, None)
    return [] if value is None else value if isinstance(value, list) else [value]


def check_objective(args) -> None:
    """What eq. 9 asks of the flags of both ACPO scripts; makes the weights of several guides sum to 1.

    Raises ValueError, in one line, for flags that contradict each other.
    """
    if not (args.quality_weight or args.anchor_weight or args.diffusion_weight):
        raise ValueError("one of --quality_weight, --anchor_weight and --diffusion_weight must be above 0")
    if args.quality_weight and not args.evaluator:
        raise ValueError(
            "--quality_weight above 0 needs an --evaluator, such as ipce:PATH or two-stream:PATH (train_iqa_ipce.py, "
            "train_iqa_twostream.py)"
        )
    try:
        args.evaluator_weight = guide_weights(args.evaluator or [], args.evaluator_weight) or None
    except ValueError as error:
        raise ValueError(f"--evaluator_weight: {error}") from error
    if getattr(args, "anchor_budget", None) and not args.anchor_weight:
        raise ValueError("--anchor_budget needs an --anchor_weight above 0 to start from")
    if args.late_start == "rollout" and args.diffusion_timesteps == "late":
        raise ValueError("--diffusion_timesteps late needs --late_start data: a sampled latent has no known noise")
    if args.late_every > 1 and not args.diffusion_weight:
        raise ValueError("--diffusion_weight 0 needs --late_every 1: between the late steps there is L_diff alone")
    if args.late_every > 1 and args.diffusion_timesteps == "late":
        raise ValueError("--diffusion_timesteps late needs --late_every 1: it draws in the late window, at every step")
    if args.diffusion_timesteps == "late" and not args.diffusion_weight:
        raise ValueError("--diffusion_timesteps late has no effect with --diffusion_weight 0")
    for name in ("guide_clean_weight", "guide_clean_weight_end"):
        if (getattr(args, name) or 0) > 1:
            raise ValueError(f"--{name}: expected a share from 0 to 1, found {getattr(args, name)}")
    if args.late_backprop_steps and args.late_backprop_steps > args.late_steps:
        raise ValueError(
            f"--late_backprop_steps: expected at most --late_steps {args.late_steps}, found {args.late_backprop_steps}"
        )
    if args.push_to_hub and args.report_to == "wandb" and args.hub_token:
        raise ValueError("--hub_token would be logged by wandb: use `hf auth login` instead")


def at_step(args, step: int):
    """The settings in force at `step`, counted from 0: `args`, with two things that change over a run.

    --guide_clean_weight is on its way to --guide_clean_weight_end, on a straight line from the first step to the last. And at
    all but every --late_every-th step the weights of eqs. 6 and 7 are 0: nothing is sampled, decoded or scored.
    """
    in_force = copy.copy(args)
    if args.guide_clean_weight_end is not None:
        share = step / max(1, args.max_train_steps - 1)
        in_force.guide_clean_weight = (1 - share) * args.guide_clean_weight + share * args.guide_clean_weight_end
    if (step + 1) % args.late_every:
        in_force.quality_weight = in_force.anchor_weight = 0.0
    return in_force


def read_demo_settings(file: Path, given) -> dict:
    """The embedded demo's settings by flag, from a JSON file; `$DEMO` in them is the folder of that file.

    Args:
        given: the arguments as they were given. A list among them takes the demo's place, and is not added to it.
    """
    settings = json.loads(file.read_text().replace("$DEMO", file.parent.as_posix()))
    return {
        name: value for name, value in settings.items() if not (isinstance(value, list) and getattr(given, name, None))
    }
