"""LoRA files and checkpoints: exact round trips, and a one-line error for everything that is missing or damaged."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from acpo_utils.checkpoints import (
    catch_signals,
    checkpoint_or_stop,
    checkpoint_step,
    find_checkpoint,
    is_due,
    release_signals,
    save_checkpoint,
)
from acpo_utils.files import atomic_write
from acpo_utils.lora import LORA_NAME, load_lora, read_lora_config, register_lora_hooks, save_lora
from tests import REPOSITORY


ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
BEYOND_ATTENTION = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]


def tiny_unet(width: int = 16) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, width),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).requires_grad_(False)


def lora_unet(rank: int = 4, alpha: float = 4, targets=ATTENTION, width: int = 16, trained: bool = True):
    unet = tiny_unet(width)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian"))
    if trained:  # lora_B starts at zero: move it, so that the LoRA does something
        generator = torch.Generator().manual_seed(1)
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return unet


def predict(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([3, 70]), torch.randn(2, 5, 16, generator=generator), return_dict=False)[0]


@pytest.mark.parametrize("targets", [ATTENTION, BEYOND_ATTENTION], ids=["attention", "beyond_attention"])
@pytest.mark.parametrize("rank, alpha", [(4, 4), (4, 10)])
def test_lora_survives_the_round_trip_into_an_adapter_and_into_a_pipeline(tmp_path, targets, rank, alpha):
    unet = lora_unet(rank, alpha, targets)
    expected = predict(unet)
    assert not torch.allclose(expected, predict(tiny_unet()), atol=1e-2)
    path = save_lora(unet, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] == [LORA_NAME]
    assert {weight.dtype for weight in load_file(path).values()} == {torch.float32}
    assert len(load_file(path)) == len(get_peft_model_state_dict(unet))

    config = read_lora_config(tmp_path)
    assert config == {"rank": rank, "alpha": alpha, "target_modules": sorted(targets)}
    other = lora_unet(config["rank"], config["alpha"], config["target_modules"], trained=False)
    load_lora(other, tmp_path)
    assert torch.equal(predict(other), expected)

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    parts = {"vae": vae, "unet": tiny_unet(), "scheduler": DDPMScheduler(steps_offset=1, clip_sample=False)}
    pipeline = StableDiffusionPipeline(
        **parts, text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.load_lora_weights(tmp_path, weight_name=LORA_NAME)
    assert torch.equal(predict(pipeline.unet), expected)


def test_lora_is_written_in_fp32(tmp_path):
    unet = lora_unet()
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert {weight.dtype for weight in load_file(save_lora(unet, tmp_path)).values()} == {torch.float32}


def test_lora_file_without_metadata_has_alpha_equal_to_rank(tmp_path):
    unet = lora_unet(rank=4, alpha=4, targets=BEYOND_ATTENTION)
    save_file(load_file(save_lora(unet, tmp_path)), tmp_path / "plain.safetensors")
    config = read_lora_config(tmp_path / "plain.safetensors")
    assert (config["rank"], config["alpha"]) == (4, 4)
    other = lora_unet(4, 4, config["target_modules"], trained=False)
    load_lora(other, tmp_path / "plain.safetensors")
    assert torch.equal(predict(other), predict(unet))


def test_lora_in_the_older_diffusers_names_loads_too(tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers

    unet = lora_unet()
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    assert any(name.endswith(".lora.down.weight") for name in layers)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    other = lora_unet(trained=False)
    load_lora(other, tmp_path)
    assert torch.equal(predict(other), predict(unet))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"width": 32}, "belongs to another model"),
        ({"rank": 8}, "has rank 4, expected 8"),
        ({"alpha": 1}, "has alpha 4, expected 1"),
        ({"targets": ["to_q", "to_k"]}, "other target modules"),
        ({"targets": BEYOND_ATTENTION}, "other target modules"),
    ],
)
def test_lora_that_does_not_fit_is_refused_and_nothing_is_loaded(tmp_path, changed, message):
    save_lora(lora_unet(), tmp_path)
    other = lora_unet(**changed)
    before = {name: weight.clone() for name, weight in other.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_lora(other, tmp_path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())


def test_lora_missing_damaged_or_of_another_kind_is_named(tmp_path):
    unet = lora_unet()
    with pytest.raises(ValueError, match="not found: .*nowhere"):
        load_lora(unet, tmp_path / "nowhere")
    path = save_lora(unet, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{LORA_NAME} is damaged"):
        read_lora_config(tmp_path)
    save_file({"decoder.weight": torch.zeros(2, 2)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="expected only tensors named unet"):
        read_lora_config(tmp_path / "vae.safetensors")


def training(tmp_path):
    """A LoRA in training as the scripts have it: an accelerator, AdamW, a warm-up schedule, global random numbers."""
    unet = lora_unet(trained=False)
    accelerator = Accelerator(cpu=True)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    unet, optimizer, schedule = accelerator.prepare(unet, optimizer, schedule)
    register_lora_hooks(accelerator, unet)

    def step() -> None:
        loss = (unet(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 5, 16), return_dict=False)[0] ** 2).mean()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return accelerator, unet, optimizer, schedule, step


def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path):
    set_seed(0)
    accelerator, unet, optimizer, schedule, step = training(tmp_path)
    for number in range(1, 6):
        step()
        if number == 2:
            save_checkpoint(accelerator, tmp_path, number)
    expected = get_peft_model_state_dict(unet)

    set_seed(1)
    accelerator, resumed, optimizer_2, schedule_2, step = training(tmp_path)
    checkpoint = find_checkpoint(tmp_path, "latest")
    assert checkpoint_step(checkpoint) == 2
    assert {"optimizer.bin", "scheduler.bin", "random_states_0.pkl", LORA_NAME} == set(os.listdir(checkpoint))
    accelerator.load_state(str(checkpoint))
    for _ in range(3):
        step()
    for name, weight in get_peft_model_state_dict(resumed).items():
        assert torch.equal(weight, expected[name]), name
    assert schedule_2.get_last_lr() == schedule.get_last_lr()
    for state, state_2 in zip(optimizer.state_dict()["state"].values(), optimizer_2.state_dict()["state"].values()):
        assert all(torch.equal(state[name], state_2[name]) for name in state)


def test_a_model_without_lora_is_stored_whole(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    weight = model.weight.detach().clone()
    save_checkpoint(accelerator, tmp_path, 7)
    model.weight.data.zero_()
    accelerator.load_state(str(find_checkpoint(tmp_path, "checkpoint-7")))
    assert torch.equal(model.weight, weight)


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    accelerator, *_ = training(tmp_path)
    for number in (2, 4, 10):
        save_checkpoint(accelerator, tmp_path, number, total_limit=2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-4"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"  # by number, not by name

    def killed(folder):
        Path(folder).mkdir()
        (Path(folder) / "optimizer.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(accelerator, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(accelerator, tmp_path, 12, total_limit=1)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-12.tmp", "checkpoint-4"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"

    monkeypatch.undo()
    save_checkpoint(accelerator, tmp_path, 14, total_limit=1)
    assert os.listdir(tmp_path) == ["checkpoint-14"]


def test_a_checkpoint_of_an_earlier_run_with_the_same_number_is_replaced(tmp_path):
    accelerator, *_ = training(tmp_path)
    save_checkpoint(accelerator, tmp_path, 2)
    (tmp_path / "checkpoint-2" / "stale.txt").write_text("of the earlier run")
    save_checkpoint(accelerator, tmp_path, 2, total_limit=1)
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    assert not (tmp_path / "checkpoint-2" / "stale.txt").exists()


@pytest.fixture(scope="module")
def complete_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    accelerator, *_, step = training(folder)
    step()
    return save_checkpoint(accelerator, folder, 3)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", LORA_NAME])
@pytest.mark.parametrize("harm", ["missing", "truncated", "empty"])
def test_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path, complete_checkpoint, name, harm):
    shutil.copytree(complete_checkpoint, tmp_path / "checkpoint-3")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-3"
    file = tmp_path / "checkpoint-3" / name
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if harm == "truncated" else b"")
    with pytest.raises(ValueError, match=f"checkpoint-3 is .*{Path(name).suffix}") as error:
        find_checkpoint(tmp_path, "latest")
    assert "\n" not in str(error.value)


def test_find_checkpoint_names_paths_and_absence(tmp_path, complete_checkpoint, caplog):
    folder = complete_checkpoint.parent
    assert find_checkpoint(tmp_path, None) is None
    with pytest.raises(ValueError, match="holds checkpoint-3 of an earlier run"):
        find_checkpoint(folder, None)
    assert find_checkpoint(folder, "checkpoint-3") == complete_checkpoint
    assert find_checkpoint(tmp_path, str(complete_checkpoint)) == complete_checkpoint
    assert find_checkpoint(tmp_path, "latest") is None and "no checkpoint-N in" in caplog.text, (
        "a new run, which is said"
    )
    with pytest.raises(ValueError, match="checkpoint-9.* found neither"):
        find_checkpoint(folder, "checkpoint-9")
    with pytest.raises(ValueError, match="is of 1 process"):
        find_checkpoint(folder, "latest", SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_GPU))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="named checkpoint-N"):
        find_checkpoint(tmp_path, "other")


def test_atomic_write_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "deep" / "metrics.json"
    with atomic_write(path) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(path.parent) == ["metrics.json"]


@pytest.fixture
def signals():
    """pytest has a handler of its own, which is put back."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_at_the_end_of_the_step_and_stops_the_run(tmp_path, signals, number):
    accelerator, *_ = training(tmp_path)
    catch_signals(accelerator)
    checkpoint_or_stop(accelerator, tmp_path, 1, due=False, total_limit=None)
    assert not list(tmp_path.iterdir())
    os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as stopped:
        checkpoint_or_stop(accelerator, tmp_path, 2, due=False, total_limit=None)
    assert stopped.value.code == 143 and find_checkpoint(tmp_path, "latest").name == "checkpoint-2"


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path, signals):
    accelerator, *_ = training(tmp_path)
    catch_signals(accelerator)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # a handler runs between two instructions of Python
    release_signals()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


TWO_PROCESSES = """
import os, sys
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model_state_dict
from acpo_utils.checkpoints import find_checkpoint, save_checkpoint
from acpo_utils.lora import register_lora_hooks
from tests.test_checkpoints import lora_unet

def training():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    unet = lora_unet(alpha=8)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 5))
    unet, optimizer, schedule = accelerator.prepare(unet, optimizer, schedule)
    register_lora_hooks(accelerator, unet)
    def step():
        for _ in range(2):
            with accelerator.accumulate(unet):
                noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
                accelerator.backward((unet(noise, 5, text, return_dict=False)[0] ** 2).mean())
                optimizer.step(); schedule.step(); optimizer.zero_grad()
    weights = lambda: get_peft_model_state_dict(accelerator.unwrap_model(unet))
    return accelerator, step, weights

accelerator, step, weights = training()
set_seed(accelerator.process_index)
for number in (1, 2, 3, 4):
    step()
    if number == 2:
        save_checkpoint(accelerator, sys.argv[1], number)
expected = {name: weight.clone() for name, weight in weights().items()}
accelerator, step, weights = training()
accelerator.load_state(str(find_checkpoint(sys.argv[1], "latest", accelerator)))
step(); step()
assert all(torch.equal(weight, expected[name]) for name, weight in weights().items())
print(f"rank {accelerator.process_index} is exact")
"""


@pytest.mark.slow
def test_two_processes_each_resume_with_their_own_random_state(tmp_path):
    root = REPOSITORY
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    # `accelerate launch --cpu --num_processes 2` starts one process only
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root)}
    result = subprocess.run(
        [*command, "train.py", "out"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "rank 0 is exact" in result.stdout and "rank 1 is exact" in result.stdout
    assert {f"random_states_{rank}.pkl" for rank in (0, 1)} <= set(os.listdir(tmp_path / "out" / "checkpoint-2"))


def test_is_due():
    assert [step for step in range(1, 8) if is_due(step, 3)] == [3, 6]
    assert [step for step in range(1, 4) if is_due(step, 1)] == [1, 2, 3]
    assert not any(is_due(step, 0) for step in range(1, 100))
