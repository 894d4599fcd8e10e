"""The comparison of methods in the same time: its clock, its choice of a rate, its table, and what it refuses."""

import json

import compare_methods as script
import pytest

from tests.launching import EXAMPLES, refused, run_script


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def test_seconds_are_those_of_the_steps(tmp_path):
    """Of a run that was cut after its third step, resumed from its second one, by a process with a clock of its own."""
    write(tmp_path / "seconds.csv", "1,20\n2,22\n3,26\n3,9\n4,11\n5,14\n")
    # 2 and 4, 5 are known: 2, 2, 3 seconds; the first step of each process is taken for their median, 2
    assert script.training_seconds(tmp_path) == [0, 2, 4, 6, 8, 11]
    write(tmp_path / "seconds.csv", "1,20\n2,21\n3,24\n")
    assert script.training_seconds(tmp_path) == [0, 2, 3, 6]


def test_steps_are_what_the_time_allows(tmp_path, monkeypatch):
    """By the mean of the timed steps, the first of them left out; in quarters."""

    def train(folder, words):
        assert words[words.index("--max_train_steps") + 1] == "4" and "--method" in words
        write(folder / "seconds.csv", "1,30\n2,31\n3,34\n4,36\n")

    monkeypatch.setattr(script, "train", train)
    args = script.parse_args(["--calibration_steps", "4", "--seconds", "50", "--output_dir", str(tmp_path)])
    assert script.calibrate("ddpo", args) == 24  # 2 seconds a step: 25 steps
    found = json.loads((tmp_path / "ddpo" / "calibration.json").read_text())
    assert found == {"seconds_per_step": 2.0, "timed_steps": 3}
    args.seconds = 1
    assert script.calibrate("ddpo", args) == 4, "from the file, at least one step a quarter"


def test_the_rate_is_the_guides_choice_with_seed_0_and_serves_the_other_seeds(tmp_path, monkeypatch):
    likes = {1e-4: 2.0, 3e-4: 2.5, 1e-3: 2.2}
    trained, measured = [], []

    def train_run(method, rate, seed, num_steps, args):
        trained.append((rate, seed, num_steps))
        folder = tmp_path / method / f"lr={rate:g},seed={seed}"
        write(folder / "rate.json", {"guide": likes[rate]})
        return folder

    monkeypatch.setattr(script, "calibrate", lambda *_: 8)
    monkeypatch.setattr(script, "train_run", train_run)
    monkeypatch.setattr(script, "evaluate", lambda world, folder, num_steps: measured.append(folder.name))
    args = script.parse_args(["--seeds", "1", "2", "--output_dir", str(tmp_path)])
    script.run_method(None, "refl", args)
    assert trained == [(1e-4, 0, 8), (3e-4, 0, 8), (1e-3, 0, 8), (3e-4, 1, 8), (3e-4, 2, 8)]
    assert measured == ["lr=0.0003,seed=1", "lr=0.0003,seed=2"]
    assert json.loads((tmp_path / "refl" / "rates.json").read_text())["best"] == 3e-4


def test_the_table_is_of_what_is_there(tmp_path):
    """One method with two seeds, one with a run, one whose rate alone is chosen; the best rate's runs and no others."""
    names = ["guide", "judge", *script.ROWS.values(), "drift"]

    def points(value):
        ends = [{"share": share, "step": 8 * share, "seconds": 100 * share} for share in script.SHARES]
        return {"base": {}, "points": [point | dict.fromkeys(names, value * point["share"]) for point in ends]}

    for method in ("acpo-data", "ddpo", "refl"):
        write(tmp_path / method / "rates.json", {"best": 3e-4, "guide": {}, "steps": 8})
    write(tmp_path / "acpo-data" / "lr=0.0003,seed=0" / "evaluation.json", points(0.1))
    write(tmp_path / "acpo-data" / "lr=0.0003,seed=1" / "evaluation.json", points(0.3))
    write(tmp_path / "acpo-data" / "lr=0.001,seed=0" / "evaluation.json", points(9))
    write(tmp_path / "ddpo" / "lr=0.0003,seed=0" / "evaluation.json", points(0.5))
    output = run_script(EXAMPLES / "compare_methods.py", "--table_only", "--output_dir", tmp_path)
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    header, _, ours, theirs = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header == ["method", "rate", "steps", "CPU s", "runs", *names]
    assert ours[:5] == ["acpo-data", "0.0003", "8", "100", "2"] and theirs[:5] == ["ddpo", "0.0003", "8", "100", "1"]
    half = 12.706 * 0.1  # Student's t of one degree of freedom, times the standard error
    assert ours[5] == f"+0.2000 ± {half:.4f}" and theirs[5] == "+0.5000" and theirs[7] == "+0.5"
    assert theirs[-1] == "0.5000"
    assert (tmp_path / "table.md").read_text().splitlines() == lines
    assert (tmp_path / "over-seconds.png").is_file() and (tmp_path / "over-guide.png").is_file()
    assert (tmp_path / "table.csv").read_text().count("\n") == 1 + 2 * len(names)


def test_a_run_of_other_flags_is_not_taken_for_this_one(tmp_path):
    write(tmp_path / "command.json", ["--method", "ddpo"])
    write(tmp_path / script.LORA_NAME, "")
    script.train(tmp_path, ["--method", "ddpo"])  # finished: nothing is started
    with pytest.raises(ValueError, match="other flags"):
        script.train(tmp_path, ["--method", "refl"])


@pytest.mark.parametrize("method", script.METHODS)
def test_every_methods_flags_are_taken(method, tmp_path):
    import rival_methods

    args = script.parse_args(["--output_dir", str(tmp_path)])
    words = script.flags_of(method, args, learning_rate=1e-3, seed=1, max_train_steps=8)
    parsed = rival_methods.parse_args(words)
    assert parsed.learning_rate == 1e-3 and parsed.balance_steps == 0 and parsed.num_eval_prompts == 0
    assert bool(parsed.guide_perturbation) == (method == "acpo-full"), "the clean score for all others"
    assert parsed.tmax == 100 and parsed.num_inference_steps == 15


def test_nothing_is_started_with_numbers_that_make_no_sense(tmp_path):
    run = EXAMPLES / "compare_methods.py"
    assert "--seconds" in refused(run, "--seconds", 0, "--output_dir", tmp_path)
    assert "--num_prompts" in refused(run, "--num_prompts", 1, "--output_dir", tmp_path)
    assert "594 captions" in refused(run, "--num_prompts", 590, "--output_dir", tmp_path)
