"""What is split up among processes: which ways are refused, whose checkpoints are read. That they train: test_scaling.py."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, compare_versions

from acpo_utils.checkpoints import find_checkpoint, save_checkpoint
from acpo_utils.sharding import (
    SHARDED,
    SHARDED_STATE,
    check_deepspeed_pickle,
    configure_sharding,
    full_weights,
    prepare,
)
from tests.test_checkpoints import lora_unet, training


OLD = compare_versions("accelerate", "<", "1.15.0")
ARGS = SimpleNamespace(train_batch_size=3, max_grad_norm=0.5)
DEEPSPEED, FSDP = SHARDED


def accelerator_of(kind, mixed_precision="bf16", **plugins):
    return SimpleNamespace(
        mixed_precision=mixed_precision,
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
    plugin = SimpleNamespace(
        zero_stage=2, deepspeed_config={"zero_optimization": {"stage": 2}, "train_batch_size": 64}
    )
    configure_sharding(accelerator_of("DEEPSPEED", deepspeed_plugin=plugin), ARGS, SHARDED)
    assert plugin.deepspeed_config == {
        "zero_optimization": {"stage": 2},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
    }


@pytest.mark.skipif(OLD, reason="FSDP2 needs accelerate 1.15")
def test_fsdp2_leaves_the_lora_in_fp32():
    accelerator = fsdp()
    configure_sharding(accelerator, ARGS, SHARDED)
    assert accelerator.state.fsdp_plugin.mixed_precision_policy is None


@pytest.mark.parametrize(
    "accelerator, kinds, expected",
    [
        (accelerator_of("DEEPSPEED"), (), "DEEPSPEED: expected one of NO, MULTI_GPU \\("),
        (fsdp(), (DEEPSPEED,), "FSDP: expected one of NO, MULTI_GPU, DEEPSPEED \\("),
        (accelerator_of("MEGATRON_LM"), SHARDED, "MEGATRON_LM: expected one of NO, MULTI_GPU, DEEPSPEED, FSDP"),
        (
            accelerator_of("DEEPSPEED", deepspeed_plugin=SimpleNamespace(zero_stage=3)),
            SHARDED,
            "stage 3: expected 1 or 2",
        ),
        (accelerator_of("DEEPSPEED", "fp16"), SHARDED, "fp16 with DEEPSPEED: expected bf16 or no"),
        (fsdp(fsdp_version=1), SHARDED, "fsdp_version 1: expected 2"),
        (fsdp(cpu_ram_efficient_loading=True), SHARDED, "efficient_loading True: expected False .the text encoder"),
        (fsdp(activation_checkpointing=True), SHARDED, "use --gradient_checkpointing"),
        (
            fsdp(state_dict_type=SimpleNamespace(name="SHARDED_STATE_DICT")),
            SHARDED,
            "expected FULL_STATE_DICT .the others",
        ),
    ],
)
def test_what_does_not_work_is_refused(accelerator, kinds, expected):
    if OLD and accelerator.distributed_type == FSDP and FSDP in kinds:
        expected = "FSDP2 needs accelerate 1.15"
    with pytest.raises(ValueError, match=expected):
        configure_sharding(accelerator, ARGS, kinds)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_a_quantised_base_is_not_split_up(kind):
    args = SimpleNamespace(**vars(ARGS), bnb_quantization_config_path="bnb.json")
    with pytest.raises(ValueError, match=f"bnb_quantization_config_path with {kind}: expected MULTI_GPU or NO"):
        configure_sharding(accelerator_of(kind), args, SHARDED)


def test_without_sharding_nothing_changes():
    configure_sharding(accelerator_of("MULTI_GPU"), ARGS, ())
    accelerator, unet = Accelerator(cpu=True), lora_unet()
    unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)
    prepared = prepare(accelerator, unet, optimizer, schedule)
    assert prepared[0] is unet and unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    with full_weights(accelerator, unet):
        assert all(type(parameter) is torch.nn.Parameter for parameter in unet.parameters())


class Import:
    def __reduce__(self):
        return print, ("run",)


def test_a_checkpoint_is_not_read_if_deepspeed_cannot_have_written_it(tmp_path, capsys):
    torch.save({"weights": torch.ones(2)}, tmp_path / "plain.pt")
    torch.save({"weights": Import()}, tmp_path / "other.pt")
    check_deepspeed_pickle(tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="names builtins.print, which DeepSpeed does not write"):
        check_deepspeed_pickle(tmp_path / "other.pt")
    with pytest.raises(pickle.UnpicklingError):  # what is read with weights_only=True needs no check
        torch.load(tmp_path / "other.pt", weights_only=True)
    assert capsys.readouterr().out == ""


def checkpoint(folder):
    accelerator, *_ = training(folder)
    return accelerator, save_checkpoint(accelerator, folder, 1)


@pytest.mark.parametrize("kind", SHARDED)
def test_a_checkpoint_of_another_kind_of_run_is_refused(tmp_path, kind):
    accelerator, folder = checkpoint(tmp_path)
    other = accelerator_of(kind)
    with pytest.raises(ValueError, match=f"is of a run by DDP, this one is by {kind.value}"):
        find_checkpoint(tmp_path, "latest", other)
    state = folder / SHARDED_STATE[kind]
    state.parent.mkdir(exist_ok=True)
    torch.save({"weights": torch.ones(2)}, state)
    with pytest.raises(ValueError, match=f"is of a run by {kind.value}, this one is by DDP"):
        find_checkpoint(tmp_path, "latest", accelerator)

    optimizer = folder / "optimizer.bin"
    if kind == DEEPSPEED:
        optimizer = optimizer.rename(state.with_name("zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    assert find_checkpoint(tmp_path, "latest", other) == folder
    state.write_bytes(state.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"is damaged: {state.name} cannot be read"):
        find_checkpoint(tmp_path, "latest", other)
    optimizer.unlink()
    with pytest.raises(ValueError, match="is incomplete: .*opti.* is missing"):
        find_checkpoint(tmp_path, "latest", other)


def test_a_pickle_of_deepspeeds_checkpoint_is_refused_in_one_line(tmp_path):
    _, folder = checkpoint(tmp_path)
    state = folder / SHARDED_STATE[DEEPSPEED]
    state.parent.mkdir()
    (folder / "optimizer.bin").rename(state.with_name("zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    for protocol in (2, 4):  # the latter's opcodes are not known to torch's reader
        torch.save({"weights": Import()}, state, pickle_protocol=protocol)
        with pytest.raises(ValueError, match="is damaged: mp_rank_00_model_states.pt cannot be read") as error:
            find_checkpoint(tmp_path, "latest", accelerator_of(DEEPSPEED))
        assert "\n" not in str(error.value)
