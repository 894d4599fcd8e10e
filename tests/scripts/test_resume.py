"""What a resumed run of the ACPO scripts may change, and what it is refused for: the scripts themselves, on tiny models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from acpo_utils.checkpoints import RUN_STATE
from acpo_utils.evaluators import TwoStreamIQA
from tests.launching import EXAMPLES, command_line, refused, run_script
from tests.tiny_images import pictures
from tests.tiny_models import tiny_ddpm


SD, DDPM = EXAMPLES / "train_acpo_lora_sd.py", EXAMPLES / "train_acpo_ddpm.py"


def equal(*files) -> bool:
    first, second = map(load_file, files)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def equal_optimizers(*folders) -> bool:
    states = [torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in folders]
    pairs = zip(*(state.values() for state in states), strict=True)
    return all(torch.equal(first[key], second[key]) for first, second in pairs for key in first)


@pytest.fixture(scope="module")
def sd_world(tmp_path_factory, tiny_pipeline, tiny_guide, captioned_images):
    """A run of four steps; the same one stopped after two; the options of both."""
    folder = tmp_path_factory.mktemp("resume_sd")
    (folder / "prompts.txt").write_text("a red wall\na blue wall\n")
    (folder / "others.txt").write_text("a green wall\na yellow wall\na red door\n")
    options = {
        "pretrained_model_name_or_path": tiny_pipeline,
        "evaluator": f"ipce:{tiny_guide}",
        "train_data_dir": captioned_images,
        "resolution": 32,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "random_flip": True,
        "anchor_budget": 0.01,
        "num_inference_steps": 2,
        "report_to": "none",
    }
    run_script(SD, *command_line(**options, max_train_steps=4, checkpointing_steps=4, output_dir=folder / "whole"))
    first = {"max_train_steps": 2, "checkpointing_steps": 2, "validation_steps": 1, "on_hacking": "keep_best"}
    first |= {"eval_prompts": folder / "prompts.txt", "judge": "python:tests.guides:darkness"}
    run_script(SD, *command_line(**options, **first, output_dir=folder / "first"))
    return folder, options | first


@pytest.fixture
def sd_resumed(sd_world, tmp_path):
    """The command line that goes on in `tmp_path / out` from the run that was stopped."""
    folder, options = sd_world
    shutil.copytree(folder / "first", tmp_path / "out")
    resumed = options | {"output_dir": tmp_path / "out", "resume_from_checkpoint": "latest"}
    return lambda **changes: command_line(**resumed | changes)


def test_a_checkpoint_holds_the_state_of_the_run_as_json_and_no_pickle_of_our_own(sd_world, tiny_pipeline):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    folder, options = sd_world
    checkpoint = folder / "first" / "checkpoint-2"
    assert {path.name for path in checkpoint.iterdir()} == {
        "optimizer.bin",
        "pytorch_lora_weights.safetensors",
        "random_states_0.pkl",
        RUN_STATE,
        "scheduler.bin",
    }
    state = json.loads((checkpoint / RUN_STATE).read_text(), parse_constant=refuse)
    assert state["step"] == 2 and state["skipped_steps"] == state["skipped_in_a_row"] == 0
    assert state["settings"]["learning_rate"] == 1e-3
    assert state["settings"]["pretrained_model_name_or_path"] == tiny_pipeline
    assert state["alarm"]["prompts"] == ["a red wall", "a blue wall"] and state["alarm"]["judges"] == ["judge"]
    assert state["alarm"]["best_step"] in (1, 2) and 0 < state["alarm"]["best_score"] < 1
    assert state["anchor_budget"].keys() == {"multiplier", "weight", "total", "count"}
    assert state["anchor_budget"]["weight"] != 1 and state["balance"] == {"below_floor": {}}


@pytest.mark.parametrize("kind", ["watched", "computed"])
def test_a_run_that_goes_on_with_other_things_to_watch_ends_as_the_whole_one(sd_world, sd_resumed, tmp_path, kind):
    folder, _ = sd_world
    watched = {
        "balance_steps": 1,
        "eval_prompts": folder / "others.txt",
        "num_eval_prompts": 2,
        "num_validation_prompts": 3,
        "validation_prompt": "a red wall",
        "validation_steps": 2,
        "num_validation_images": 1,
        "num_inference_steps": 3,
        "guidance_scale": 2,
        "eval_batch_size": 2,
        "judge": ["python:tests.guides:brightness", "python:tests.guides:darkness"],
        "on_hacking": "warn",
        "report_to": "tensorboard",
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 2,
    }
    computed = {
        "balance_steps": 0,
        "eval_prompts": None,
        "judge": None,
        "validation_steps": 0,
        "checkpointing_steps": 4,
        "gradient_checkpointing": True,
        "dataloader_num_workers": 1,
    }
    changes = {"watched": watched, "computed": computed}[kind]
    run_script(SD, *sd_resumed(max_train_steps=4, **changes))
    out, whole = tmp_path / "out", folder / "whole"
    assert equal(*(run / "pytorch_lora_weights.safetensors" for run in (out, whole)))
    assert not equal(out / "pytorch_lora_weights.safetensors", folder / "first" / "pytorch_lora_weights.safetensors")
    assert equal_optimizers(*(run / "checkpoint-4" for run in (out, whole)))
    settings = json.loads((out / "args.json").read_text())
    assert settings["max_train_steps"] == 4 and settings["balance_steps"] == changes["balance_steps"]
    alarm = json.loads((out / "checkpoint-4" / RUN_STATE).read_text())["alarm"]
    assert alarm["best_step"] == 0, "with other prompts, or without any, the best one is looked for anew"


REFUSED = {
    "learning_rate": (2e-3, "0.001", "0.002"),
    "seed": (1, "0", "1"),
    "tmax": (50, "100", "50"),
    "quality_weight": (0.2, "0.1", "0.2"),
    "train_data_dir": ("another/folder", None, "another/folder"),
    "evaluator": (["python:tests.guides:brightness"], None, "['python:tests.guides:brightness']"),
    "lr_scheduler": ("cosine", "constant", "cosine"),
    "rank": (8, "4", "8"),
    "train_batch_size": (4, "2", "4"),
    "gradient_accumulation_steps": (2, "1", "2"),
    "anchor_budget": (None, "0.01", "None"),
    "random_flip": (None, "True", "False"),
}


def check_refused(script, flags, folder, name, before, now):
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    line = refused(script, *flags)
    assert "checkpoint-2 is of a run with " in line and f"--{name} {before} (now {now})" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files, "args.json among them"


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_training_is_refused_and_nothing_is_written(sd_world, sd_resumed, tmp_path, name):
    value, before, now = REFUSED[name]
    if before is None:
        given = sd_world[1][name]
        before = [given] if name == "evaluator" else given
    check_refused(SD, sd_resumed(**{name: value}), tmp_path / "out", name, before, now)


def test_a_checkpoint_of_the_old_form_or_a_damaged_one_is_refused(sd_resumed, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-2"
    text = (checkpoint / RUN_STATE).read_text()
    (checkpoint / RUN_STATE).write_text(text[: len(text) // 2])
    assert f"checkpoint-2 is damaged: {RUN_STATE} cannot be read" in refused(SD, *sd_resumed())
    (checkpoint / RUN_STATE).unlink()
    torch.save({"skipped_steps": 0}, checkpoint / "custom_checkpoint_0.pkl")
    line = refused(SD, *sd_resumed())
    assert f"has no {RUN_STATE}: it is incomplete, or of acpo_utils 0.1" in line


def test_a_checkpoint_of_the_other_script_is_refused(ddpm_world, sd_resumed, tmp_path):
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    shutil.copytree(ddpm_world[0] / "first" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    assert "checkpoint-2 is of a run with --pretrained_model_name_or_path " in refused(SD, *sd_resumed())


@pytest.fixture(scope="module")
def ddpm_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume_ddpm")
    for name, number in (("images", 12), ("held out", 5), ("others", 6)):
        pictures(folder / name, number)
    tiny_ddpm(folder / "ddpm")
    torch.manual_seed(4)
    TwoStreamIQA(widths=(4, 4, 8, 8), fusion_width=8).save_pretrained(folder / "guide")
    options = {
        "pretrained_model_name_or_path": folder / "ddpm",
        "evaluator": f"two-stream:{folder / 'guide'}",
        "train_data_dir": folder / "images",
        "validation_data_dir": folder / "held out",
        "learning_rate": 1e-3,
        "train_batch_size": 2,
        "random_flip": True,
        "use_ema": True,
        "sampler": "ddim",
        "ddpm_num_inference_steps": 4,
        "last_steps": 2,
        "report_to": "none",
        "num_eval_images": 0,
    }
    run_script(DDPM, *command_line(**options, max_train_steps=4, checkpointing_steps=4, output_dir=folder / "whole"))
    first = {"max_train_steps": 2, "checkpointing_steps": 2}
    run_script(DDPM, *command_line(**options, **first, output_dir=folder / "first"))
    return folder, options | first


@pytest.fixture
def ddpm_resumed(ddpm_world, tmp_path):
    folder, options = ddpm_world
    shutil.copytree(folder / "first", tmp_path / "out")
    resumed = options | {"output_dir": tmp_path / "out", "resume_from_checkpoint": "latest"}
    return lambda **changes: command_line(**resumed | changes)


def test_a_ddpm_that_goes_on_with_other_things_to_watch_ends_as_the_whole_one(ddpm_world, ddpm_resumed, tmp_path):
    folder, _ = ddpm_world
    changes = {
        "balance_steps": 1,
        "validation_data_dir": folder / "others",
        "num_validation_images": 5,
        "num_eval_images": 4,
        "eval_batch_size": 3,
        "save_images_epochs": 1,
        "judge": f"two-stream:{folder / 'guide'}",
        "report_to": "tensorboard",
        "checkpointing_steps": 1,
        "gradient_checkpointing": True,
        "weight_dtype": "fp16",
    }
    run_script(DDPM, *ddpm_resumed(max_train_steps=4, **changes))
    checkpoints = [run / "checkpoint-4" for run in (tmp_path / "out", folder / "whole")]
    for name in ("adapter_model.safetensors", "ema.safetensors"):
        assert equal(*(checkpoint / name for checkpoint in checkpoints)), name
    assert equal_optimizers(*checkpoints)
    state = json.loads((checkpoints[0] / RUN_STATE).read_text())
    assert state.keys() == {"step", "settings", "skipped_steps", "skipped_in_a_row", "balance"}
    assert not list(checkpoints[0].glob("custom_checkpoint_*"))


@pytest.mark.parametrize(
    "name, value, before, now",
    [
        ("use_ema", None, True, False),
        ("ema_power", 0.5, 0.75, 0.5),
        ("rank", 0, 4, 0),
        ("validation_data_dir", None, "held out", None),
        ("last_steps", 1, 2, 1),
    ],
)
def test_what_changes_a_ddpms_training_is_refused(ddpm_world, ddpm_resumed, tmp_path, name, value, before, now):
    if name == "validation_data_dir":
        before = ddpm_world[0] / before
    check_refused(DDPM, ddpm_resumed(**{name: value}), tmp_path / "out", name, before, now)
