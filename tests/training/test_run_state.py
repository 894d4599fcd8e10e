"""A checkpoint's run_state.json: what it holds, which settings a resumed run may change, steps that are not finite."""

import argparse
import json
import math
import shutil
from functools import cache

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import compare_versions

from acpo_utils.checkpoints import RUN_STATE, find_checkpoint, read_run_state, save_checkpoint
from acpo_utils.training.run_state import MAY_DIFFER, RunState, changed_settings
from tests.launching import EXAMPLES


SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("train_*.py"))
if compare_versions("diffusers", "<", "0.37.0"):  # which has no such pipeline
    SCRIPTS.remove("train_acpo_lora_flux2_klein")


class Part:
    """Keeps a number, as the alarm, the budget and the balance do."""

    def __init__(self, number):
        self.number = number

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def build_run(checkpoint=None, number=0, **settings):
    """A run of one linear layer with a schedule, its state and the part that it keeps."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    run = RunState(accelerator, argparse.Namespace(**{"seed": 3} | settings), checkpoint)
    part = Part(number)
    run.keep(part=part)
    return accelerator, model, optimizer, run, part


@pytest.fixture
def checkpoint(tmp_path):
    accelerator, _, _, run, _ = build_run(number=0.5, hub_token="secret", judge=["a"])
    run.skipped_steps, run.skipped_in_a_row = 5, 2
    return save_checkpoint(accelerator, tmp_path, 7)


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_it_is_json_beside_accelerates_files_and_no_pickle_of_our_own(checkpoint):
    files = {path.name for path in checkpoint.iterdir()}
    assert files == {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.bin", RUN_STATE}
    text = (checkpoint / RUN_STATE).read_text()
    state = json.loads(text, parse_constant=refuse)
    assert state["step"] == 7 and (state["skipped_steps"], state["skipped_in_a_row"]) == (5, 2)
    assert state["settings"] == {"seed": 3, "judge": ["a"], "mixed_precision": "no"} and state["part"] == {
        "number": 0.5
    }
    assert "secret" not in text


def test_a_resumed_run_has_the_number_of_skipped_steps_and_its_parts(checkpoint):
    *_, run, part = build_run(checkpoint)
    assert run.resume() == 7
    assert (run.skipped_steps, run.skipped_in_a_row, part.number) == (5, 2, 0.5)
    *_, new, part = build_run()
    assert new.resume() == 0 and (new.skipped_steps, part.number) == (0, 0)


def test_what_the_checkpoint_does_not_know_is_no_reason_to_refuse_it(checkpoint):
    """A later version may have a flag more; a run that is continued by it has its default."""
    *_, run, _ = build_run(checkpoint, a_later_flag=1)
    assert run.resume() == 7


def test_the_precision_counts_wherever_it_was_said(checkpoint):
    """By the flag or, where that is left out, by the launcher's configuration."""
    *_, run, _ = build_run(checkpoint, mixed_precision=None)
    assert run.resume() == 7
    state = read_run_state(checkpoint)
    state["settings"]["mixed_precision"] = "bf16"
    (checkpoint / RUN_STATE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"--mixed_precision bf16 \(now no\)"):
        build_run(checkpoint)


def test_a_checkpoint_of_0_1_is_refused(checkpoint):
    (checkpoint / RUN_STATE).unlink()
    torch.save({"skipped_steps": 0}, checkpoint / "custom_checkpoint_0.pkl")
    with pytest.raises(ValueError, match=f"has no {RUN_STATE}: it is incomplete, or of acpo_utils 0.1") as error:
        build_run(checkpoint)
    assert "\n" not in str(error.value)


HARMS = {
    "empty": "",
    "half": '{"step": 7, "settings": {"se',
    "no json": "step: 7",
    "a list": "[7]",
    "no settings": '{"step": 7}',
    "settings of another kind": '{"step": 7, "settings": ["seed"]}',
    "no step": '{"settings": {}}',
    "another step": '{"step": 8, "settings": {}}',
    "no utf-8": b"\xff\xfe{}",
    "deep": "[" * 200_000,
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_one_is_named_in_one_line(checkpoint, harm):
    file = checkpoint / RUN_STATE
    file.write_bytes(HARMS[harm] if isinstance(HARMS[harm], bytes) else HARMS[harm].encode())
    with pytest.raises(ValueError, match=f"checkpoint-7 is damaged: {RUN_STATE} cannot be read") as error:
        build_run(checkpoint)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_script_is_refused_in_one_line(checkpoint):
    """One that keeps other parts, though no setting that both have differs."""
    *_, run, _ = build_run(checkpoint)
    run.keep(alarm=Part(1))
    with pytest.raises(ValueError, match="checkpoint-7 is of another kind of run: .*has no alarm") as error:
        run.resume()
    assert "\n" not in str(error.value)


def test_every_setting_that_differs_is_named_with_both_values(checkpoint):
    with pytest.raises(ValueError, match=r"checkpoint-7 is of a run with --seed 3 \(now 4\): resume with") as error:
        build_run(checkpoint, seed=4, judge=["b"])
    assert "judge" not in str(error.value) and "\n" not in str(error.value)


# --- Which flags may differ, of the parsers themselves


@cache
def parser_of(name: str) -> argparse.ArgumentParser:
    """The script's parser, with its defaults for a run of one's own."""

    class Caught(Exception):
        pass

    def catch(self, *_, **__):
        raise Caught(self)

    script = __import__(name)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        script.parse_args([])
    return caught.value.args[0]


def actions(name: str) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser_of(name)._actions if action.dest != "help"}


def defaults(name: str) -> dict:
    return {flag: parser_of(name).get_default(flag) for flag in actions(name)}


def another_value(action: argparse.Action, value):
    """What somebody might give in place of `value`."""
    if isinstance(action.default, bool):
        return not value
    if action.choices:
        return next(choice for choice in action.choices if choice != value)
    if action.type in (int, float):
        other = (value or 0) + 1 if not isinstance(value, list) else value[0] + 1
        return [other] if action.nargs == "+" else other
    return ["another"] if action.nargs == "+" else "another"


EVERY_FLAG = [(name, flag) for name in SCRIPTS for flag in actions(name)]


def test_the_training_scripts_are_found():
    latent = [f"train_acpo_lora_{name}" for name in ("flux", "flux2_klein", "sd", "sd3", "sdxl", "z_image")]
    found = [name for name in latent if name in SCRIPTS]
    assert SCRIPTS == ["train_acpo_ddpm", *found, "train_iqa_ipce", "train_iqa_twostream"] and len(found) > 3
    assert len(EVERY_FLAG) > 200


def test_what_may_differ_is_a_flag_of_some_script():
    assert MAY_DIFFER <= {flag for _, flag in EVERY_FLAG}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_other_flag_has_to_be_as_it_was(name, tmp_path):
    """Of each flag alone, by the rule itself and by a run: another value is refused, or allowed, and named if refused."""
    saved = defaults(name) | {"late_start": "rollout", "validation_data_dir": "a folder"}
    saved = {flag: value for flag, value in saved.items() if flag in actions(name)}
    accelerator, *_ = build_run(**saved | {"seed": 3})
    checkpoint = save_checkpoint(accelerator, tmp_path, 1)
    for flag, action in actions(name).items():
        value = (saved | {"seed": 3})[flag]
        other = another_value(action, value)
        assert other != value
        changed = saved | {"seed": 3, flag: other}
        chooses = name.startswith("train_iqa_") and flag in ("validation_steps", "max_validation_samples")
        if not chooses and (flag in MAY_DIFFER or flag == "mixed_precision"):  # of the latter what is in force counts
            build_run(checkpoint, **changed)
            continue
        assert changed_settings(saved | {"seed": 3}, changed) == [flag]
        with pytest.raises(ValueError) as error:
            build_run(checkpoint, **changed)
        assert f"--{flag} {value} (now {other})" in str(error.value)


def test_sampling_may_differ_where_the_training_samples_nothing():
    """Number of steps and guidance are then of validation alone, unless the scored step is guided."""
    data = {"late_start": "data", "scored_guidance": False, "num_inference_steps": 50, "guidance_scale": 7.5}
    other = {"num_inference_steps": 20, "guidance_scale": 2.0}
    assert changed_settings(data, data | other) == []
    assert changed_settings(data | {"scored_guidance": True}, data | {"scored_guidance": True} | other) == [
        "guidance_scale"
    ]
    rollout = data | {"late_start": "rollout"}
    assert changed_settings(rollout, rollout | other) == ["num_inference_steps", "guidance_scale"]
    assert changed_settings(data, rollout | other) == ["late_start", "num_inference_steps", "guidance_scale"]


def test_images_that_are_held_out_from_the_training_have_to_stay_so():
    """Without a folder of their own they are the last of the training's; a folder of their own may be another one."""
    own = {"validation_data_dir": "a", "num_validation_images": 64}
    assert changed_settings(own, {"validation_data_dir": "b", "num_validation_images": 32}) == []
    taken = own | {"validation_data_dir": None}
    assert changed_settings(taken, taken | {"num_validation_images": 32}) == ["num_validation_images"]
    assert changed_settings(taken, own) == ["validation_data_dir"]
    assert changed_settings(own, taken) == ["validation_data_dir"]


# --- Steps that are not finite


def test_steps_that_are_not_finite_are_dropped_counted_and_in_the_end_an_error():
    _, model, optimizer, run, _ = build_run()
    before = model.weight.detach().clone()

    def step(value, number, max_grad_norm=1.0):
        (model(torch.ones(1, 2)).sum() * value).backward()
        norm = run.clip_grad_norm(optimizer, list(model.parameters()), max_grad_norm, number)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    for number in range(1, 10):
        assert not step(float("nan"), number) < float("inf")
    assert torch.equal(model.weight, before) and run.skipped_steps == 9
    assert step(3.0, 10) == pytest.approx(3 * 3**0.5, rel=1e-5)
    assert (model.weight - before).norm().item() == pytest.approx(0.1 * (2 / 3) ** 0.5, rel=1e-4), "clipped to norm 1"
    assert run.skipped_in_a_row == 0
    before = model.weight.detach().clone()
    assert step(3.0, 11, max_grad_norm=0.0) == pytest.approx(3 * 3**0.5, rel=1e-5)
    assert (model.weight - before).norm().item() == pytest.approx(0.1 * 3 * math.sqrt(2), rel=1e-4), "0 clips nothing"
    with pytest.raises(FloatingPointError, match="ten steps in a row, up to step 21"):
        for number in range(12, 22):
            step(float("inf"), number)
    assert run.skipped_steps == 19


def test_the_count_of_skipped_steps_in_a_row_goes_on_after_a_resume(checkpoint):
    """Two of them stand in the checkpoint: eight more end the run."""
    _, model, optimizer, run, _ = build_run(checkpoint)
    run.resume()
    with pytest.raises(FloatingPointError, match="up to step 15"):
        for number in range(8, 18):
            (model(torch.ones(1, 2)).sum() * math.nan).backward()
            run.clip_grad_norm(optimizer, list(model.parameters()), 1.0, number)
            optimizer.zero_grad()


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "other" / "checkpoint-7")
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(3, 1))
    accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    found = find_checkpoint(tmp_path / "other", "latest", accelerator)
    run = RunState(accelerator, argparse.Namespace(seed=3), found)
    with pytest.raises(ValueError, match="checkpoint-7 is of another model: .*size mismatch") as error:
        run.resume()
    assert "\n" not in str(error.value)
