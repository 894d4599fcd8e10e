"""What all training scripts share: the way of launching, the run's state in a checkpoint, steps that are not finite."""

import json
from argparse import Namespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from acpo_utils.checkpoints import save_checkpoint
from acpo_utils.training.run import RunState, resume, start_run


def settings(folder, **changes):
    values = {"gradient_accumulation_steps": 1, "mixed_precision": "no", "report_to": "none", "logging_dir": "logs"}
    values |= {"output_dir": str(folder / "out"), "seed": 3, "allow_tf32": False, "hub_token": "secret"}
    return Namespace(**values | changes)


def test_the_settings_are_kept_without_the_token_and_the_seed_is_set(tmp_path):
    accelerator = start_run(settings(tmp_path, gradient_accumulation_steps=2))
    assert accelerator.gradient_accumulation_steps == 2
    drawn = torch.rand(2)
    start_run(settings(tmp_path))
    assert torch.equal(torch.rand(2), drawn)
    kept = json.loads((tmp_path / "out" / "args.json").read_text())
    assert kept["seed"] == 3 and "hub_token" not in kept


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="--output_dir .*out cannot be written to"):
        start_run(settings(tmp_path))


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM])
def test_what_a_script_is_not_made_for_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(ValueError, match=f"distributed_type {kind.value}: expected one of NO, MULTI_GPU \\("):
        start_run(settings(tmp_path))
    assert not (tmp_path / "out").exists()


def test_processes_that_would_train_apart_are_refused(tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", str(accelerator.num_processes + 1))
    with pytest.raises(ValueError, match="2 processes were started.*ACCELERATE_USE_CPU"):
        start_run(settings(tmp_path))


def prepared(batch_size, accumulation=1):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    state = RunState(accelerator, batch_size)
    accelerator.register_for_checkpointing(state)
    return accelerator, model, optimizer, state


def test_a_run_goes_on_with_its_split_and_its_count(tmp_path):
    accelerator, *_, state = prepared(4, 2)
    state.skipped_steps = 5
    checkpoint = save_checkpoint(accelerator, tmp_path, 7)
    accelerator, *_, state = prepared(4, 2)
    assert resume(accelerator, None) == 0 and resume(accelerator, checkpoint) == 7 and state.skipped_steps == 5
    for split, name in (((8, 2), "train_batch_size 4, this run has 8"), ((4, 1), "gradient_accumulation_steps 2")):
        with pytest.raises(ValueError, match=name):
            resume(prepared(*split)[0], checkpoint)


def test_other_options_are_named_in_place_of_a_traceback(tmp_path):
    checkpoint = save_checkpoint(prepared(4)[0], tmp_path, 7)
    accelerator, *_ = prepared(4)
    accelerator.register_for_checkpointing(RunState(accelerator, 4))
    with pytest.raises(ValueError, match="checkpoint-7 is of another model or of other options"):
        resume(accelerator, checkpoint)


def test_steps_that_are_not_finite_are_dropped_counted_and_in_the_end_an_error(tmp_path):
    accelerator, model, optimizer, state = prepared(4)
    before = model.weight.detach().clone()

    def step(value, number):
        (model(torch.ones(1, 2)).sum() * value).backward()
        norm = state.clip(accelerator, optimizer, list(model.parameters()), 1.0, number)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    for number in range(1, 10):
        assert not step(float("nan"), number) < float("inf")
    assert torch.equal(model.weight, before) and state.skipped_steps == 9
    assert step(3.0, 10) == pytest.approx(3 * 3**0.5, rel=1e-5)
    assert (model.weight - before).norm().item() == pytest.approx(0.1 * (2 / 3) ** 0.5, rel=1e-4), "clipped to norm 1"
    assert state.skipped_in_a_row == 0
    with pytest.raises(FloatingPointError, match="ten steps in a row, up to step 20"):
        for number in range(11, 21):
            step(float("inf"), number)
    assert state.skipped_steps == 19
