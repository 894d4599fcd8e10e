"""What memory a training needs, said before it starts: by part, and flags that save where it does not fit.

Not counted: the CUDA context and what libraries and the allocator take beside the tensors (a GiB or two), sampling for
validation, and a guide or judge whose weights no torch.nn.Module shows. How long a step takes the progress bar says.
"""

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import torch

from acpo_utils.families.latents import StraightThrough, latent_factor, vae_factor
from acpo_utils.families.quantization import frozen_bytes
from acpo_utils.sharding import WEIGHT_DTYPES
from acpo_utils.training.step_cost import StepCost, is_tiny, tiny_decoder


logger = logging.getLogger(__name__)


def log_estimate(
    accelerator,
    training_step,
    models,
    evaluator,
    judges,
    noise_scheduler,
    guide_inputs,
    conditions,
    args,
    tiny_vae: str = "madebyollin/taesd",
) -> None:
    """Logs, on the main process, the memory of the training that is about to start. It never ends a run.

    Args:
        models: (unet with its LoRA, vae, decoder, text_encoder). evaluator: the guide or None. judges: by name.
        guide_inputs: (images (B, 3, H, W) in [0, 1] as the decoder gives them, B prompts); None without L_quality.
        conditions: as in `StepCost`. tiny_vae: what to suggest for the family's latents.
    """
    if not accelerator.is_main_process:
        return
    device = models[0].device  # as tensors have it: of several processes, accelerate calls the CPU cpu:0
    args = SimpleNamespace(**vars(args) | {"mixed_precision": accelerator.mixed_precision})
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            step_cost = StepCost(
                training_step,
                models,
                guide_inputs and (evaluator, *guide_inputs),
                noise_scheduler,
                conditions,
                device,
            )
            scorers = {"guide": [evaluator], "judges": list(judges.values())}
            memory = memory_parts(step_cost, scorers, args)
            available = available_memory(device, memory)
            table = memory_table(memory, available, args)
            logger.info(table if hasattr(models[0].config, "block_out_channels") else table.replace("U-Net", "model"))
            if sum(memory.values()) > available:
                logger.warning(advice(step_cost, scorers, available, args, tiny_vae))
            if args.balance_steps and args.gradient_checkpointing:
                whole = SimpleNamespace(**vars(args) | {"gradient_checkpointing": False})
                more = sum(memory_parts(step_cost, scorers, whole).values()) - sum(memory.values())
                logger.info(
                    f"  and up to {max(more, 0) / 2**20:,.1f} MiB more at each of --balance_steps, where several backward "
                    "passes keep what is checkpointed; --balance_steps 0 leaves them out"
                )
    except Exception as error:  # what this cannot run may train all the same
        logger.warning(f"No estimate of memory: {type(error).__name__}: {error}")


def memory_parts(step_cost: StepCost, scorers: dict[str, list], args: SimpleNamespace) -> dict[str, float]:
    """{part: bytes} on the training's device: weights, the LoRA's training, a step's graph and what its peak adds."""
    unet, vae, decoder, text_encoder = step_cost.models
    width = 2 if args.mixed_precision in WEIGHT_DTYPES else 4
    offloaded = args.cache_latents and step_cost.device.type != "cpu"
    parts = {
        "weights: U-Net": frozen_bytes(unet, step_cost.quantization, width),
        "weights: VAE": num_bytes(vae) - offloaded * num_bytes(vae.encoder),
        "weights: text encoder": 0 if offloaded else width * sum(p.numel() for p in text_encoder.parameters()),
    }
    if args.decode == "tiny":
        parts["weights: tiny VAE"] = num_bytes(decoder if is_tiny(decoder) else tiny_decoder(vae))  # or a suggestion
    elif isinstance(decoder, StraightThrough):
        parts["weights: the gradient's decoder"] = num_bytes(decoder.backward_vae)
    elif args.decode_dtype in WEIGHT_DTYPES:
        parts["weights: decoder to train by"] = num_bytes(vae.decoder) / 2
    for name, several in scorers.items():
        each = [one for scorer in several for one in getattr(scorer, "evaluators", {"": scorer}).values()]
        modules = (getattr(one, "function", one) for one in each)
        parts[f"weights: {name}"] = sum(num_bytes(one) for one in modules if isinstance(one, torch.nn.Module))
    parts["LoRA, its gradient, AdamW"] = 4 * sum(p.nbytes for p in unet.parameters() if p.requires_grad)
    kept = step_cost(args)[0]
    passes = [name for name in kept if name.startswith("U-Net") and kept[name]]
    second = args.diffusion_weight and args.diffusion_timesteps == "full"  # the step's last pass
    parts["kept: U-Net, L_diff"] = kept[passes.pop()] if second else 0
    parts["kept: U-Net, late"] = sum(kept[name] for name in passes)
    parts |= {f"kept: {name}": kept.get(name, 0) for name in ("decode", "guide")}
    return {name: size for name, size in (parts | {"passing, at the peak": kept["passing"]}).items() if size}


def num_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def available_memory(device: torch.device, memory: dict[str, float]) -> float:
    """Bytes for all that `memory_parts` names: what is free, and what this process has taken for the weights."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + sum(size for part, size in memory.items() if "weights" in part)


def memory_table(memory: dict[str, float], available: float, args: SimpleNamespace) -> str:
    lines = [f"  {part:28}{size / 2**20:10,.1f} MiB" for part, size in memory.items()]
    precision = args.mixed_precision if args.mixed_precision in WEIGHT_DTYPES else "fp32"
    head = f"Memory, estimated for batch {args.train_batch_size}, {args.resolution} px, {precision}:"
    tail = f"  {'sum':28}{sum(memory.values()) / 2**20:10,.1f} MiB of {available / 2**20:,.1f} MiB available"
    return "\n".join([head, *lines, tail])


def flag_changes(args: SimpleNamespace, vae, tiny_vae: str = "madebyollin/taesd") -> Iterator[dict]:
    """What could be changed to save memory, one at a time; first what leaves the objective as it is."""
    if not args.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if args.mixed_precision not in WEIGHT_DTYPES:
        yield {"mixed_precision": "bf16"}
    if not (args.cache_latents or args.train_prompts):
        yield {"cache_latents": True} | ({} if args.center_crop else {"center_crop": True})
    if args.train_batch_size > 1:
        parts = 2 if args.train_batch_size % 2 == 0 else args.train_batch_size
        accumulation = args.gradient_accumulation_steps * parts
        yield {"train_batch_size": args.train_batch_size // parts, "gradient_accumulation_steps": accumulation}
    if args.quality_weight and args.train_batch_size > 1 and not args.decode_batch_size:
        yield {"decode_batch_size": 1}
    if args.quality_weight and args.decode_dtype == "fp32":
        yield {"decode_dtype": "bf16"}
    if args.late_start == "data" and args.diffusion_weight and args.diffusion_timesteps == "full":
        yield {"diffusion_timesteps": "late"}
    if args.quality_weight and args.decode == "full":
        factor = latent_factor(vae)
        yield {"decode": "tiny", "tiny_vae_name_or_path": tiny_vae if vae_factor(vae) == 8 else "PATH"}
        yield {"decode": "crop", "decode_size": max(args.resolution // 2 // factor, 1) * factor}


def advice(
    step_cost: StepCost,
    scorers: dict[str, list],
    available: float,
    args: SimpleNamespace,
    tiny_vae: str = "madebyollin/taesd",
) -> str:
    """What the changes save, each alone, and the first combination that fits."""

    def total(changes: dict) -> float:
        return sum(memory_parts(step_cost, scorers, SimpleNamespace(**vars(args) | changes)).values())

    def words(changes: dict) -> str:
        return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changes.items())

    vae, least, taken = step_cost.models[1], total({}), {}
    each = sorted(((total(changes), words(changes)) for changes in flag_changes(args, vae, tiny_vae)))
    lines = ["This may not fit. Each of these alone, estimated:"]
    lines += [f"  {size / 2**20:10,.1f} MiB  {flags}" for size, flags in each if size < least]
    smaller = True
    while least > available and smaller:
        smaller = False
        for changes in flag_changes(SimpleNamespace(**vars(args) | taken), vae, tiny_vae):
            if total(taken | changes) < least:
                taken, smaller = taken | changes, True
                least = total(taken)
                break
    lines.append("Together these fit:" if least <= available else "All of this together would still not fit:")
    return "\n".join([*lines, f"  {least / 2**20:10,.1f} MiB  {words(taken)}"])
