"""How a run begins: the way of launching, its folder, its settings; and what is logged of a step."""

import json
import warnings
from argparse import Namespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from filelock import FileLock, Timeout
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acpo_utils.checkpoints import save_checkpoint
from acpo_utils.training.run import log_images, start_run


def settings(folder, **changes):
    values = {"gradient_accumulation_steps": 1, "mixed_precision": "no", "report_to": "none", "logging_dir": "logs"}
    values |= {"output_dir": str(folder / "out"), "seed": 3, "allow_tf32": False, "hub_token": "secret"}
    return Namespace(**values | {"resume_from_checkpoint": None, "push_to_hub": False} | changes)


def test_the_settings_are_kept_without_the_token_and_the_seed_is_set(tmp_path):
    accelerator, _ = start_run(settings(tmp_path, gradient_accumulation_steps=2))
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


def test_pictures_are_written_and_tracked(tmp_path):
    accelerator, _ = start_run(settings(tmp_path, report_to="tensorboard"))
    accelerator.init_trackers("test")
    images = torch.rand(2, 3, 8, 8)
    log_images(accelerator, "validation", images, 7)
    accelerator.end_training()
    with Image.open(tmp_path / "out" / "validation" / "step-7.png") as picture:
        assert picture.width > 16 and picture.height > 8, "both side by side"
    (events,) = (tmp_path / "out" / "logs").glob("*/events*")
    log = EventAccumulator(str(events)).Reload()
    assert [event.step for event in log.Images("validation")] == [7]


def test_what_would_fail_late_is_refused_before_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for changes, message in (
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"report_to": "clearml"}, "--report_to clearml is not installed: pip install clearml"),
        ({"push_to_hub": True, "hub_token": None}, "--push_to_hub needs a token"),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        with warnings.catch_warnings(), pytest.raises(ValueError, match=message) as error:
            warnings.simplefilter("ignore")  # accelerate's, of the tracker
            start_run(settings(tmp_path, **changes))
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_one_writes(tmp_path):
    other = FileLock(tmp_path / "out" / ".lock")
    (tmp_path / "out").mkdir()
    with other, pytest.raises(ValueError, match="another run is writing there now"):
        start_run(settings(tmp_path))
    assert not (tmp_path / "out" / "args.json").exists()
    start_run(settings(tmp_path))
    with pytest.raises(Timeout):  # and now this process writes there, until it ends
        other.acquire(timeout=0)


def test_the_results_of_an_earlier_run_are_set_aside(tmp_path, caplog):
    folder = tmp_path / "out"
    start_run(settings(tmp_path, seed=1))
    names = {"metrics.json", "comparison.png", "notes.txt", "guide"}
    for name in names:
        (folder / name).write_text("of the first run")
    start_run(settings(tmp_path, seed=2))
    assert {path.name for path in folder.iterdir()} == {".lock", "args.json", "previous-1", "notes.txt", "guide"}
    assert {path.name for path in (folder / "previous-1").iterdir()} == {"args.json", "metrics.json", "comparison.png"}
    seeds = [json.loads((folder / name / "args.json").read_text())["seed"] for name in ("previous-1", ".")]
    assert seeds == [1, 2] and "holds the results of an earlier run" in caplog.text
    start_run(settings(tmp_path, seed=3))
    assert (folder / "previous-2" / "args.json").is_file()


def test_what_a_run_begins_from_is_not_set_aside(tmp_path):
    """A LoRA of an earlier run, given by its file or by its folder, and a guide."""
    folder = tmp_path / "out"
    lora = folder / "pytorch_lora_weights.safetensors"
    for given in (
        {"lora_path": str(lora)},
        {"lora_path": str(folder)},
        {"evaluator": ["pickscore", f"ipce:{folder}"]},
    ):
        start_run(settings(tmp_path))
        lora.write_text("weights")
        start_run(settings(tmp_path, **given))
        assert lora.read_text() == "weights"


def test_a_refused_resume_leaves_the_settings_of_the_run_as_they_were(tmp_path):
    accelerator, _ = start_run(settings(tmp_path))
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    save_checkpoint(accelerator, tmp_path / "out", 2)
    before = (tmp_path / "out" / "args.json").read_bytes()
    with pytest.raises(ValueError, match=r"--seed 3 \(now 4\)"):
        start_run(settings(tmp_path, seed=4, resume_from_checkpoint="latest"))
    assert (tmp_path / "out" / "args.json").read_bytes() == before
    start_run(settings(tmp_path, hub_token="another", resume_from_checkpoint="latest"))
    assert (tmp_path / "out" / "checkpoint-2").is_dir() and not (tmp_path / "out" / "previous-1").exists()
