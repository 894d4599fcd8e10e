"""The real script: what it plans, refuses and prints, and what it makes of runs that it launches through accelerate."""

import csv
import fcntl
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_ablations as script
import torch
from scipy import stats

from acpo_utils.ablations.check import _ask
from acpo_utils.ablations.grid import check_rows, variant_row
from tests.launching import EXAMPLES, ON_CPU, fresh_process


SCRIPT = EXAMPLES / "run_ablations.py"
# Every flag that a script has, with real consequences that take no time: no model, no images.
QUICK = """
import argparse, json, time
from pathlib import Path

def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gain", type=float, default=1.0)
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--resume_from_checkpoint")
    return parser.parse_args()

if __name__ == "__main__":
    args = parse_args()
    args.output_dir.mkdir(exist_ok=True)
    if args.fail:
        raise SystemExit("error: it was told to fail")
    if args.wait and not args.resume_from_checkpoint:
        (args.output_dir / "checkpoint-1").mkdir()
        time.sleep(300)
    guide = {"base_mean": 1.0, "finetuned_mean": 1.0 + args.gain * (1 + args.seed)}
    (args.output_dir / "metrics.json").write_text(json.dumps({"comparisons": {"guide": guide}}))
"""


@pytest.fixture
def quick(tmp_path) -> str:
    (tmp_path / "quick.py").write_text(QUICK)
    return str(tmp_path / "quick.py")


@pytest.fixture
def asked_here(monkeypatch):
    """The scripts of examples/ are asked for their flags in this process, where they are imported already."""

    def ask(path, accelerate_flags, flag_lists):
        module = importlib.import_module(Path(path).stem)
        return [_ask(lambda: module.parse_args(list(flags))) for flags in flag_lists]

    monkeypatch.setattr(script, "check_flags", ask)
    return ask


@pytest.fixture
def ablate(capsys, tmp_path):
    """The script's main in this process, output folder `out`; what it printed, or its one line of error."""

    def run(*words, fails=False) -> str:
        words = ["--output_dir", str(tmp_path / "out"), *map(str, words)]
        with fresh_process():
            if not fails:
                script.main(script.parse_args(words))
                return capsys.readouterr().out
            with pytest.raises((ValueError, SystemExit)) as stopped:
                script.main(script.parse_args(words))
        captured = capsys.readouterr()
        message = str(stopped.value) if stopped.type is ValueError else captured.err.partition("error: ")[2].strip()
        assert message and "\n" not in message
        return message + ("\n" + captured.out if captured.out else "")

    return run


def test_named_grids_are_the_papers():
    assert [f"table{n}" for n in range(4, 12)] + ["ddpm"] == list(script.NAMED_GRIDS)
    values = {
        name: [re.findall(r"--(\w+)(?: ([\d.]+))?", flags) for row, flags in rows.items() if row != "baseline"]
        for name, (_, rows) in script.NAMED_GRIDS.items()
    }
    assert values["table4"] == [[("max_train_samples", n)] for n in ("5000", "10000", "60000")]
    assert values["table5"] == values["table6"] == [[]]
    assert values["table7"] == [[("quality_weight", w)] for w in ("0.1", "1", "10")]
    assert values["table8"] == [[("full_trajectory", "")], [("last_steps", "1")], [("last_steps", "10")]]
    assert values["table9"] == [[("anchor_weight", "0")], [("anchor_weight", "1")]]
    assert values["table10"] == [[("quality_weight", w)] for w in ("0.1", "1", "100")]
    assert values["table11"] == [[("tmax", t)] for t in ("100", "300", "500", "1000")]
    assert len(script.NAMED_GRIDS["ddpm"][1]) == 8


@pytest.mark.parametrize("name", ["train_acpo_lora_sd.py", "train_acpo_ddpm.py"])
def test_the_scripts_take_every_flag_of_their_named_grids(asked_here, name):
    model = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y", "--evaluator", "z"]
    flags = [
        [*model, *variant_row(row, text).flags]
        for of_script, rows in script.NAMED_GRIDS.values()
        if of_script == name
        for row, text in rows.items()
    ]
    assert len(flags) > 10
    answers = asked_here(EXAMPLES / name, [], [*flags, [*model, "--tmax", "late"]])
    assert [answer["error"] for answer in answers[:-1]] == [None] * len(flags)
    assert answers[-1]["error"] == "argument --tmax: invalid int value: 'late'"


def test_rows_of_named_grids_have_folders_of_their_own():
    for _, rows in script.NAMED_GRIDS.values():
        check_rows([variant_row(name, flags) for name, flags in rows.items()])


def test_plan():
    words = ["--grid", "tmax=1,2", "--variant", "full:", "--seeds", "2", "--", "--rank", "8"]
    args = script.parse_args(words)
    rows, runs = script.plan(args)
    assert [row.name for row in rows] == ["full", "tmax=1", "tmax=2"]
    assert [(run.row, run.seed) for run in runs] == [(row.name, seed) for seed in (0, 1) for row in rows]
    assert runs[4].flags == ("--rank", "8", "--tmax", "1", "--seed", "1")
    assert runs[4].folder == Path("ablations/tmax=1,seed=1") and Path(args.script).name == "train_acpo_lora_sd.py"
    args = script.parse_args(["--grid", "table8", "--variant", "mine: --last_steps 3"])
    rows, _ = script.plan(args)
    assert [rows[0].name, rows[1].name, len(rows)] == ["mine", "baseline", 5]
    assert args.output_dir == "ablations/table8" and Path(args.script).name == "train_acpo_ddpm.py"


MISTAKES = {
    "nothing to run": ([], "nothing to run"),
    "unknown grid": (["--grid", "table3"], "'table3'"),
    "two named grids": (["--grid", "table7", "--grid", "tmax=1"], "table7 stands alone"),
    "no seeds": (["--grid", "tmax=1", "--seeds", "0"], "--seeds must be at least 1"),
    "a flag of the script": (
        ["--grid", "tmax=1", "--seed", "3"],
        "--seed 3 (flags of the training script go after --)",
    ),
    "missing script": (["--grid", "tmax=1", "--script", "no/such.py"], "no/such.py does not exist"),
    "seed": (["--grid", "tmax=1", "--", "--seed", "3"], "--seed (after --) cannot be given"),
    "abbreviated": (["--grid", "tmax=1", "--", "--output=x"], "--output_dir (after --) cannot be given"),
    "token": (["--variant", "x: --hub_token y"], "--hub_token (row 'x') cannot be given"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(ablate, tmp_path, case):
    words, message = MISTAKES[case]
    assert message in ablate(*words, fails=True)
    assert not (tmp_path / "out").exists()


def test_flags_that_are_not_taken_are_found_before_the_first_run(ablate, quick, tmp_path):
    out = ablate("--script", quick, "--grid", "gain=1,much", fails=True)
    assert "row 'gain=much': quick.py does not take its flags: argument --gain: invalid float value: 'much'" in out
    out = ablate("--script", quick, "--grid", "gian=1", fails=True)
    assert "unrecognized arguments: --gian 1" in out
    out = ablate("--script", quick, "--grid", "gain=1", "--accelerate_flags=--bogus 3", fails=True)
    assert "accelerate launch does not take --bogus 3: " in out
    Path(quick).write_text("args = 3\n")
    out = ablate("--script", quick, "--grid", "gain=1", fails=True)
    assert "quick.py cannot be asked for its flags: expected a training script with a function parse_args" in out
    assert not (tmp_path / "out").exists()


def test_a_script_that_would_measure_nothing_is_found_too(ablate, asked_here, tmp_path):
    model = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y", "--evaluator", "z"]
    out = ablate("--grid", "tmax=1", "--", *model, fails=True)
    assert "row 'tmax=1' would measure nothing, and have no metrics.json: it needs --eval_prompts" in out
    out = ablate("--grid", "table7", "--", *model, "--num_eval_images", "0", fails=True)
    assert "it needs --num_eval_images above 0" in out


def test_a_failed_run_is_reported_and_the_others_go_on(ablate, quick, tmp_path):
    """Then once more: what is finished is left alone, what has failed is tried again."""
    words = ["--script", quick, "--variant", "bad: --fail", "--grid", "gain=1,2", "--seeds", "1"]
    dry = ablate(*words, "--dry_run")
    assert dry.count("accelerate launch ") == 3 and not (tmp_path / "out").exists()
    assert f"# gain=2,seed=0: new\naccelerate launch {quick} --gain 2 --seed 0 --output_dir {tmp_path}/out/" in dry

    out = ablate(*words, fails=True)
    assert out.startswith("1 of 3 runs failed") and "Failed: bad,seed=0: it was told to fail" in out
    assert "error: it was told to fail" in (tmp_path / "out" / "bad,seed=0" / "run.log").read_text()
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        table = {row["row"]: row for row in csv.DictReader(file)}
    assert [float(table["gain=2"][name]) for name in ("base_mean", "finetuned_mean", "mean_difference")] == [1, 3, 2]
    assert (table["gain=2"]["runs"], table["gain=2"]["failed"]) == ("1", "0")
    assert (table["bad"]["runs"], table["bad"]["failed"], table["bad"]["metric"]) == ("0", "1", "")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["status"] for run in results["runs"]] == ["failed", "finished", "finished"]
    assert (tmp_path / "out" / "plots" / "gain.png").is_file() and (tmp_path / "out" / "plots" / "rows.png").is_file()

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("gain*/*")}
    assert "2 of 3 runs were finished before" in ablate(*words, fails=True)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("gain*/*")}
    out = ablate("--script", quick, "--variant", "bad: --gain 3", fails=True)
    assert "holds a run of another command (there fail true, gain not given, now fail not given, gain 3)" in out


def test_an_interrupted_run_ends_its_training_and_is_continued(ablate, quick, tmp_path):
    folder = tmp_path / "out" / "slow,seed=0"
    words = ["--script", quick, "--variant", "quick:", "--variant", "slow: --wait", "--seeds", "1"]
    command = [sys.executable, SCRIPT, "--output_dir", tmp_path / "out", *words]
    environment = os.environ | ON_CPU
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / "checkpoint-1").is_dir():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on from here" in err and "| quick |" in out
    with open(folder / "run.log") as file:  # raises BlockingIOError while a process of the training lives
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert json.loads((folder / "run.json").read_text())["finished"] is False

    assert "1 of 2 runs were finished before" in ablate(*words)
    log = (folder / "run.log").read_text()
    assert log.count("$ accelerate launch") == 2 and log.count("--resume_from_checkpoint latest") == 1


def test_end_to_end_on_a_tiny_ddpm(ablate, tmp_path):
    """Real runs of train_acpo_ddpm.py; the second time all of them are skipped and the table is the same."""
    from acpo_utils.evaluators import TwoStreamIQA
    from tests.tiny_images import pictures
    from tests.tiny_models import tiny_ddpm

    pictures(tmp_path / "images", 12)
    torch.manual_seed(4)
    TwoStreamIQA(widths=(4, 4, 8, 8), fusion_width=8).save_pretrained(tmp_path / "guide")
    options = {
        "pretrained_model_name_or_path": tiny_ddpm(tmp_path / "ddpm"),
        "evaluator": f"two-stream:{tmp_path / 'guide'}",
        "train_data_dir": tmp_path / "images",
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "sampler": "ddim",
        "ddpm_num_inference_steps": 4,
        "num_validation_images": 4,
        "num_eval_images": 4,
        "report_to": "none",
    }
    passed_on = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    words = ["--script", EXAMPLES / "train_acpo_ddpm.py", "--grid", "last_steps=2", "--seeds", "2", "--"]
    out = ablate(*words, *passed_on)
    folders = [tmp_path / "out" / f"last_steps=2,seed={seed}" for seed in (0, 1)]
    results = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    metrics = [result["comparisons"] | result["panel"] for result in results]
    assert metrics[0]["guide"]["base_mean"] != metrics[1]["guide"]["base_mean"], "the seeds are different"
    table = json.loads((tmp_path / "out" / "results.json").read_text())["table"]
    assert [line["metric"] for line in table] == list(metrics[0])
    for line in table:
        differences = [of_run[line["metric"]]["mean_difference"] for of_run in metrics]
        interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        assert line["mean_difference"] == pytest.approx(sum(differences) / 2)
        assert (line["interval_low"], line["interval_high"]) == pytest.approx((interval.low, interval.high))
        assert line["runs"] == 2 and line["failed"] == 0
    assert json.loads((folders[1] / "args.json").read_text())["seed"] == 1
    assert "last_steps=2" in out and "0 of 2 runs were finished before" in out

    times = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    again = ablate(*words, *passed_on)
    assert "2 of 2 runs were finished before" in again
    assert times == {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["table"] == table
