"""DeepSpeed's ZeRO and FSDP2: what the processes of a run split up among them, and how to have a U-Net whole again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import DistributedType, compare_versions, convert_outputs_to_fp32


WEIGHT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed_precision
# In a checkpoint, of each kind the file that no other has.
SHARDED_STATE = {
    DistributedType.DEEPSPEED: "pytorch_model/mp_rank_00_model_states.pt",
    DistributedType.FSDP: "pytorch_model_fsdp.bin",
}
SHARDED = tuple(SHARDED_STATE)
# What DeepSpeed itself puts into its checkpoints. It reads them by unpickling, which could run anything else, too.
DEEPSPEED_GLOBALS = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def configure_sharding(accelerator, args, kinds: tuple[DistributedType, ...]) -> None:
    """Checks the way of sharding, if there is one, and sets what the plugins cannot know.

    Args:
        args: the script's. kinds: of `SHARDED`, what the script is made for.

    Raises:
        ValueError: for another one, for fp16, and for options and versions with which the scripts go wrong.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.MEGATRON_LM or kind in SHARDED and kind not in kinds:
        known = ", ".join(["NO", "MULTI_GPU", *(kind.value for kind in kinds)])
        raise ValueError(f"distributed_type {kind.value}: expected one of {known} (docs/scaling.md says why).")
    if kind in SHARDED and accelerator.mixed_precision == "fp16":
        raise ValueError(f"fp16 with {kind.value}: expected bf16 or no. Its loss scale is not that of the scripts.")
    if kind in SHARDED and getattr(args, "bnb_quantization_config_path", None):
        raise ValueError(
            f"--bnb_quantization_config_path with {kind.value}: expected MULTI_GPU or NO. It was not tried."
        )
    if kind == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator, args)
    if kind == DistributedType.FSDP:
        _configure_fsdp(accelerator.state.fsdp_plugin)


def _configure_deepspeed(accelerator, args) -> None:
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage not in (1, 2):
        found = f"zero_stage {plugin.zero_stage}"
        raise ValueError(f"{found}: expected 1 or 2. 0 is DDP; 3 splits up what one process samples with.")
    plugin.deepspeed_config |= {
        "train_batch_size": "auto",  # accelerate multiplies the next two
        "train_micro_batch_size_per_gpu": args.train_batch_size,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm,
    }


def _configure_fsdp(plugin) -> None:
    if compare_versions("accelerate", "<", "1.15.0"):
        raise ValueError("FSDP2 needs accelerate 1.15 or later: an older one clips each part of the gradient alone.")
    state_dict, efficient = plugin.state_dict_type.name, plugin.cpu_ram_efficient_loading
    for option, found, expected, why in (
        ("fsdp_version", plugin.fsdp_version, 2, "FSDP1 was not tried"),
        ("fsdp_state_dict_type", state_dict, "FULL_STATE_DICT", "the others' checkpoints are pickles"),
        ("fsdp_cpu_ram_efficient_loading", efficient, False, "the text encoder would be loaded once only"),
        ("fsdp_activation_checkpointing", plugin.activation_checkpointing, False, "use --gradient_checkpointing"),
    ):
        if found != expected:
            raise ValueError(f"{option} {found}: expected {expected} ({why}).")
    plugin.mixed_precision_policy = None  # the LoRA stays in fp32: `prepare` computes by autocast, as DDP does


def prepare(accelerator, unet, optimizer, lr_scheduler):
    """`accelerator.prepare` of a U-Net with a LoRA, whichever way it is sharded; in every way it returns fp32."""
    if accelerator.distributed_type in SHARDED:
        unet.to(memory_format=torch.contiguous_format)  # the one that both can split up
        # accelerate does this for DDP alone, and DeepSpeed's autocast leaves out the anchor's pass and sampling.
        if dtype := WEIGHT_DTYPES.get(accelerator.mixed_precision):
            unet.forward = convert_outputs_to_fp32(torch.autocast(accelerator.device.type, dtype)(unet.forward))
    return accelerator.prepare(unet, optimizer, lr_scheduler)


@contextmanager
def full_weights(accelerator, unet: torch.nn.Module) -> Iterator[None]:
    """Inside, each process has all weights of a U-Net that FSDP2 has split up, and can sample alone. Else it changes nothing.

    To be entered and left by every process. `state_dict()` would split the weights up again, so that what is called inside
    reads `named_parameters()`.
    """
    split = []
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.fsdp import FSDPModule

        split = [module for module in unet.modules() if isinstance(module, FSDPModule)]
    for module in split:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in split:
            module.reshard()
            # The outermost was not split up between forward and backward, nor the last norm: a small gathering more.
            if module is not unet:
                module.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)


def save_state(accelerator, folder: str | Path) -> None:
    """`accelerator.save_state`, from DeepSpeed without the frozen weights."""
    options = {"exclude_frozen_parameters": True} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}
    accelerator.save_state(str(folder), **options)


def load_state(accelerator, folder: str | Path) -> None:
    """`accelerator.load_state` of what `save_state` wrote."""
    options = {"load_module_strict": False} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}
    accelerator.load_state(str(folder), **options)


def check_deepspeed_pickle(file: Path) -> None:
    """Raises ValueError if DeepSpeed would import from `file`, of one of its checkpoints, what it never puts there."""
    if other := set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - DEEPSPEED_GLOBALS:
        raise ValueError(f"it names {', '.join(sorted(other))}, which DeepSpeed does not write")
