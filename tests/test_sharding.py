"""What is split up among processes: which ways are refused, whose checkpoints are read. That they train: test_scaling.py."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, compare_versions

from acpo_utils.checkpoints import find_checkpoint, save_checkpoint
from acpo_utils.lora import register_lora_hooks
from acpo_utils.sharding import SHARDED_STATE, check_pickle, configure_sharding, prepare, whole_weights
from tests.test_checkpoints import lora_unet


OLD = compare_versions("accelerate", "<", "1.15.0")
ARGS = SimpleNamespace(train_batch_size=3, max_grad_norm=0.5)
ALL = ("deepspeed", "fsdp")


def accelerator_of(kind, **plugins):
    return SimpleNamespace(
        distributed_type=DistributedType(kind),
        gradient_accumulation_steps=2,
        num_processes=1,
        state=SimpleNamespace(**plugins),
    )


def fsdp(**changes):
    values = {"fsdp_version": 2, "state_dict_type": SimpleNamespace(name="FULL_STATE_DICT")}
    values |= {"cpu_ram_efficient_loading": False, "activation_checkpointing": False}
    return accelerator_of("FSDP", fsdp_plugin=SimpleNamespace(**values | changes, mixed_precision_policy="bf16"))


def test_deepspeed_is_told_what_a_step_is():
    plugin = SimpleNamespace(zero_stage=2, deepspeed_config={"zero_optimization": {"stage": 2}})
    configure_sharding(accelerator_of("DEEPSPEED", deepspeed_plugin=plugin), ARGS, ALL)
    assert plugin.deepspeed_config == {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
    }


@pytest.mark.skipif(OLD, reason="FSDP2 needs accelerate 1.15")
def test_fsdp2_leaves_the_lora_in_fp32():
    accelerator = fsdp()
    configure_sharding(accelerator, ARGS, ALL)
    assert accelerator.state.fsdp_plugin.mixed_precision_policy is None


@pytest.mark.parametrize(
    "accelerator, kinds, expected",
    [
        (accelerator_of("DEEPSPEED"), (), "DEEPSPEED: expected one of NO, MULTI_GPU \\("),
        (fsdp(), ("deepspeed",), "FSDP: expected one of NO, MULTI_GPU, DEEPSPEED \\("),
        (accelerator_of("MEGATRON_LM"), ALL, "MEGATRON_LM: expected one of NO, MULTI_GPU, DEEPSPEED, FSDP"),
        (accelerator_of("DEEPSPEED", deepspeed_plugin=SimpleNamespace(zero_stage=3)), ALL, "stage 3: expected 1 or 2"),
        (fsdp(fsdp_version=1), ALL, "fsdp_version 1: expected 2"),
        (fsdp(cpu_ram_efficient_loading=True), ALL, "efficient_loading True: expected False .the text encoder"),
        (fsdp(activation_checkpointing=True), ALL, "use --gradient_checkpointing"),
        (
            fsdp(state_dict_type=SimpleNamespace(name="SHARDED_STATE_DICT")),
            ALL,
            "expected FULL_STATE_DICT .the others",
        ),
    ],
)
def test_what_does_not_work_is_refused(accelerator, kinds, expected):
    if OLD and accelerator.distributed_type == DistributedType.FSDP and "fsdp" in kinds:
        expected = "FSDP2 needs accelerate 1.15"
    with pytest.raises(ValueError, match=expected):
        configure_sharding(accelerator, ARGS, kinds)


def test_without_sharding_nothing_changes():
    configure_sharding(accelerator_of("MULTI_GPU"), ARGS, ())
    accelerator, unet = Accelerator(cpu=True), lora_unet()
    unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)
    prepared = prepare(accelerator, unet, optimizer, schedule)
    assert prepared[0] is unet and unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    with whole_weights(accelerator, unet):
        assert all(type(parameter) is torch.nn.Parameter for parameter in unet.parameters())


class Import:
    def __reduce__(self):
        return print, ("run",)


def test_a_checkpoint_is_not_read_if_deepspeed_cannot_have_written_it(tmp_path, capsys):
    torch.save({"weights": torch.ones(2)}, tmp_path / "plain.pt")
    torch.save({"weights": Import()}, tmp_path / "other.pt")
    check_pickle(tmp_path / "plain.pt", "DEEPSPEED")
    with pytest.raises(ValueError, match="other.pt names builtins.print, which DeepSpeed does not write"):
        check_pickle(tmp_path / "other.pt", "DEEPSPEED")
    with pytest.raises(pickle.UnpicklingError):  # what is read with weights_only=True needs no check
        torch.load(tmp_path / "other.pt", weights_only=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ALL)
def test_a_checkpoint_of_another_kind_of_run_is_refused(tmp_path, kind):
    accelerator, unet = Accelerator(cpu=True), lora_unet()
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)
    unet, *_ = accelerator.prepare(unet, optimizer, schedule)
    register_lora_hooks(accelerator, unet)
    folder = save_checkpoint(accelerator, tmp_path, 1)
    other = accelerator_of(kind.upper())
    with pytest.raises(ValueError, match=f"is of a run by DDP, this one is by {kind.upper()}"):
        find_checkpoint(tmp_path, "latest", other)
    state = folder / SHARDED_STATE[kind.upper()]
    state.parent.mkdir(exist_ok=True)
    torch.save({"weights": torch.ones(2)}, state)
    assert find_checkpoint(tmp_path, "latest", other) == folder
    with pytest.raises(ValueError, match=f"is of a run by {kind.upper()}, this one is by DDP"):
        find_checkpoint(tmp_path, "latest", accelerator)
    state.write_bytes(state.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"is damaged: {state.name} cannot be read"):
        find_checkpoint(tmp_path, "latest", other)
