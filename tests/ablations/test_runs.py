"""Folders of runs: what counts as finished, what is refused, how a run is continued, why it failed."""

import fcntl
import json
from pathlib import Path

import pytest

from acpo_utils.ablations.runs import Run, command, execute, failure, failure_reason, manifest, run_status


@pytest.fixture
def run(tmp_path):
    flags = ("--tmax", "100", "--seed", "0")
    return Run("tmax=100", 0, tmp_path / "tmax=100,seed=0", "examples/train.py", ("--num_processes", "2"), flags)


def record(run, metrics=False, **content):
    run.folder.mkdir(exist_ok=True)
    (run.folder / "run.json").write_text(json.dumps(manifest(run) | content))
    if metrics:
        (run.folder / "metrics.json").write_text("{}")


def test_status(run):
    assert run_status(run) == "new"
    run.folder.mkdir()
    (run.folder / "run.log").touch()
    (run.folder / ".run.1.tmp.json").touch()  # another process is about to start it
    assert run_status(run) == "new"
    record(run, finished=False)
    assert run_status(run) == "unfinished" and failure(run) is None
    record(run, finished=False, error="ValueError: no")
    assert run_status(run) == "failed" and failure(run) == "ValueError: no"
    record(run, finished=True)
    assert run_status(run) == "unfinished", "without metrics.json nothing is finished"
    record(run, metrics=True, finished=False)
    assert run_status(run) == "unfinished", "metrics.json alone may be of a run that was cut after it"
    record(run, finished=True)
    assert run_status(run) == "finished"


def test_a_finished_run_may_be_moved_with_its_script(run, tmp_path):
    record(run, metrics=True, finished=True)
    run.folder.rename(tmp_path / "elsewhere")
    assert run_status(run._replace(folder=tmp_path / "elsewhere", script="/other/place/train.py")) == "finished"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flags": ("--tmax", "300", "--seed", "0")}, "there tmax 100, now tmax 300"),
        ({"flags": ("--tmax", "100", "--seed", "0", "--use_ema")}, "there use_ema not given, now use_ema true"),
        ({"flags": ("--seed", "0", "--tmax", "100")}, "the same flags in another order"),
        ({"script": "other.py"}, "there script train.py, now script other.py"),
        ({"accelerate_flags": ()}, "there accelerate --num_processes 2, now accelerate none"),
    ],
)
def test_a_run_of_another_command_is_refused(run, changes, message):
    record(run, metrics=True, finished=True)
    with pytest.raises(ValueError, match="tmax=100,seed=0 holds a run of another command") as error:
        run_status(run._replace(**changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_of_unknown_origin_are_refused(run):
    run.folder.mkdir()
    (run.folder / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="holds metrics.json and no run.json"):
        run_status(run)
    (run.folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged"):
        run_status(run)


def test_the_command_continues_from_a_checkpoint(run):
    expected = ["accelerate", "launch", "--num_processes", "2", "examples/train.py", *run.flags]
    expected += ["--output_dir", str(run.folder)]
    assert command(run) == expected
    (run.folder / "checkpoint-5.tmp").mkdir(parents=True)
    assert command(run) == expected, "a checkpoint that was being written is none"
    (run.folder / "checkpoint-5").mkdir()
    assert command(run) == [*expected, "--resume_from_checkpoint", "latest"]


def test_a_run_that_another_process_holds_is_left_to_it(run):
    run.folder.mkdir()
    with open(run.folder / "run.log", "w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert execute(run) == "running elsewhere"
    assert not (run.folder / "run.json").exists()
    record(run, metrics=True, finished=True)
    assert execute(run) == "finished", "it ended since this process planned it"
    assert Path(run.folder, "run.log").read_text() == ""


@pytest.mark.parametrize(
    ("output", "code", "reason"),
    [
        (
            "$ accelerate launch x\nusage: x\nx.py: error: argument --tmax: invalid\nTraceback\nsubprocess.CalledProcessError: exit 2",
            2,
            "x.py: error: argument --tmax: invalid",
        ),
        ("  0%|   | 0/4\r 25%|#  | 1/4\rerror: --tmax must be in 1..1000\n", 1, "--tmax must be in 1..1000"),
        ("[rank0]: torch.OutOfMemoryError: CUDA\nx.ChildFailedError: y\n", 1, "[rank0]: torch.OutOfMemoryError: CUDA"),
        ("Error bars are drawn\nA line about a ValueError: none\n", 3, "exit status 3"),
        ("CalledProcessError: Command died with <Signals.SIGKILL: 9>.", 1, "ended by SIGKILL (out of memory?)"),
        ("", -9, "ended by signal 9"),
    ],
)
def test_why_it_failed(output, code, reason):
    assert failure_reason(output, code) == reason
