"""The GPU check, rehearsed at tiny sizes on the CPU: its tables have their rows, and what fails says why."""

import json
import math
import time

import gpu_check as script
import measured_run
import pytest
import torch

from tests.launching import EXAMPLES, refused, run_script


def launch_here(check, path, *flags, launcher=False):
    """In place of a process of its own, which imports torch and diffusers again."""
    try:
        run_script(path, *flags)
    except SystemExit as stop:
        return str(stop.code), 0.0
    return None, 1.0


def rehearse(monkeypatch, tmp_path, *parts) -> dict:
    monkeypatch.setattr(script.Check, "launch", launch_here)
    flags = ["--size", "tiny", "--device", "cpu", "--output_dir", str(tmp_path), "--parts", *parts]
    script.main(script.parse_args(flags))
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert (tmp_path / "gpu_check.md").read_text().count("\n## ") == len(parts) == len(report["parts"])
    assert not (tmp_path / "work").exists() and report["hardware"]["torch"] == torch.__version__
    tables = {}
    for part in report["parts"].values():
        tables |= part["tables"]
    return tables


def test_steps_where_their_time_goes_and_precisions(monkeypatch, tmp_path):
    monkeypatch.setitem(script.STEPS, script.README, script.STEPS[script.SHIPPED])  # two runs less
    monkeypatch.setattr(script, "PRECISIONS", {name: script.PRECISIONS[name] for name in ("bf16", "fp16")})
    tables = rehearse(monkeypatch, tmp_path, "steps", "profile", "precision")
    steps, goals, *others = tables.values()
    assert [row["run"] for row in steps] == list(script.STEPS)
    assert all(row["s"] > 0 and row["estimate GB"] > 0 and "peak GB" not in row for row in steps)
    assert steps[0]["of the LoRA run"] == 1
    assert [row["met"] for row in goals].count("not measured") == 1  # there is no peak of a GPU's memory
    parts, busy, waits, operations, noise, precisions = others
    shares = {row["part"]: row["share"] for row in parts}
    expected = "U-Net, base; U-Net, student; decode; guide; encode; captions; data; log; clipping, optimizer"
    backward = {f"{name}, backward" for name in ("U-Net, student", "decode", "guide")}
    assert {*expected.split("; "), *backward, "noise, drawn on the CPU"} < shares.keys()
    assert sum(shares.values()) == pytest.approx(2)  # with the row of the sum
    assert shares["U-Net, student, backward"] > shares["noise, drawn on the CPU"] > 0
    waits = {row["where"]: row["a step"] for row in waits}
    assert waits["acpo_utils/training/run.py:mean_terms tolist"] == 1
    assert waits["acpo_utils/training/run_state.py:clip_grad_norm float"] == 1
    assert not any("training_step" in where or "losses" in where for where in waits), "the step itself reads nothing"
    assert operations[0]["ms"] > 0 and busy[0]["kernels run, ms"] > 0 and len(noise) == 6
    bf16, fp16 = precisions
    assert bf16["of bf16"] == 1 and bf16["losses, all finite"] == "yes" and "needs a GPU" in fp16["note"]


@pytest.mark.slow
def test_large_models_and_what_their_parts_are_called(monkeypatch, tmp_path):
    tables = rehearse(monkeypatch, tmp_path, "large")
    (first, rows), *_ = tables.items()
    assert [row["run"] for row in rows] == list(script.LARGE) and all(row["s"] > 0 for row in rows)
    assert len(tables) == 1 + 4 * len(script.LARGE)


def test_the_demo_is_compared_with_the_spread_of_the_seeds():
    reference = json.loads(script.SEEDS.read_text())
    low, high = min(reference["difference"]["guide"]), max(reference["difference"]["guide"])
    metrics = {"comparisons": {"guide": {"base_mean": 2.68, "mean_difference": (low + high) / 2}}, "panel": {}}
    rows = {(row["what"], row["metric"]): row for row in script.demo_rows(metrics)}
    guide = rows["difference", "guide"]
    mean = sum(reference["difference"]["guide"]) / 3
    std = math.sqrt(sum((value - mean) ** 2 for value in reference["difference"]["guide"]) / 2)
    assert guide["within"] == "yes" and guide["±"] == pytest.approx(4.302653 * std * math.sqrt(4 / 3), rel=1e-5)
    metrics["comparisons"]["guide"]["mean_difference"] = 0.02
    rows = {(row["what"], row["metric"]): row["within"] for row in script.demo_rows(metrics)}
    assert rows["difference", "guide"] == "no" and rows["change", "kid:vgg"] == "not measured"


def test_a_process_of_its_own_ends_in_time_and_says_why_it_failed(tmp_path):
    check = script.Check(script.parse_args(["--device", "cpu", "--output_dir", str(tmp_path)]))
    (tmp_path / "fails.py").write_text("print('hello')\nraise SystemExit('error: expected this')\n")
    assert check.launch(tmp_path / "fails.py")[0] == "error: expected this"
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(60)\n")
    check.deadline = time.monotonic() + 0.5
    assert "no more time" in check.launch(tmp_path / "sleeps.py")[0]
    assert "no time was left" in check.launch(tmp_path / "sleeps.py")[0]
    log = "torch.OutOfMemoryError: CUDA out of memory.\nTraceback\nsubprocess.CalledProcessError: Command\n"
    assert script.why(log) == "torch.OutOfMemoryError: CUDA out of memory."


def test_the_loss_scale_has_settled_or_not():
    settled = script.loss_scale_columns([65536.0, 32768.0] + [16384.0] * 10)
    assert settled["settled"] == "yes" and settled["unchanged for"] == 10 and settled["loss scale, last"] == 16384
    assert script.loss_scale_columns([4.0, 2.0])["settled"] == "no" and script.loss_scale_columns([]) == {}


def test_backward_passes_have_their_own_time():
    watch = measured_run.Stopwatch(torch.device("cpu"))
    watch.running = True
    weight = torch.ones(2, requires_grad=True)

    def slow(x):
        time.sleep(0.01)
        return x * 2

    out = watch.wrapped("first", slow)(weight)
    out = watch.wrapped("second", slow)(out)
    watch.mark("between")
    out.sum().backward()
    watch.mark("")
    assert torch.equal(weight.grad, torch.full((2,), 4.0))
    labels = [label for label, _ in watch.marks]
    assert labels[-4:] == ["between", "second, backward", "first, backward", ""]
    spent = watch.milliseconds(1)
    assert spent["first"] >= 10 and spent["second"] >= 10 and spent["first, backward"] < spent["first"]


def test_mistakes_are_one_line(tmp_path):
    check = EXAMPLES / "gpu_check.py"
    assert "--seconds: expected a number above 0" in refused(check, "--seconds", 0)
    if not torch.cuda.is_available():
        assert "expected a CUDA device, found none" in refused(check, "--output_dir", tmp_path)
    run = EXAMPLES / "measured_run.py"
    assert "found no file" in refused(run, "--measured_file", tmp_path / "a.json", tmp_path / "no.py")
    few = ["--profile_steps", 1, EXAMPLES / "train_acpo_lora_sd.py", "--max_train_steps", 5]
    assert "--max_train_steps of at least 6" in refused(run, "--measured_file", tmp_path / "a.json", *few)
    assert "--num_images" in refused(EXAMPLES / "random_pipeline.py", "--num_images", 0, "--output_dir", tmp_path)
