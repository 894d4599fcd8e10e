"""Stages of rating sets: what the flag says, whose rows are whose, the maps, and the script resumed in a later stage."""

import csv
import json
import math
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image as PILImage
from safetensors.torch import load_file

from acpo_utils.evaluators import load_evaluator
from acpo_utils.ratings.best import Best
from acpo_utils.ratings.sets import RatingSet
from acpo_utils.ratings.stages import (
    ScoreMaps,
    Stage,
    join_sets,
    parse_stages,
    read_stages,
    resumed_step,
    set_steps,
    to_scale,
    value_per_stage,
)
from tests.launching import refused, run_script
from tests.scripts.test_train_iqa_ipce import SCRIPT
from tests.tiny_models import build_clip_folder


def write_set(folder, number=16, scale=(0.0, 5.0), levels=None, seed=0):
    """A csv set of grey pictures with noise, two for each prompt; scores on `scale` fall with the noise."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(seed), []
    for i in range(number):
        noise = rng.uniform(0, 60)
        pixels = np.clip(128 + rng.normal(0, noise, (18, 20, 3)), 0, 255).astype(np.uint8)
        PILImage.fromarray(pixels).save(folder / f"{i}.png")
        part = 1 - noise / 60
        if levels:
            part = levels[0] + (levels[1] - levels[0]) * part
        rows.append([f"{i}.png", f"a grey wall, {i // 2}", scale[0] + (scale[1] - scale[0]) * part, "ab"[i % 2]])
    with open(folder / f"{folder.name}.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "prompt", "mos", "generator"], *rows])
    return folder / f"{folder.name}.csv"


def test_what_the_flag_says():
    specs = ["agiqa-1k:data/1k", "AGIQA-3K:/a+b/3k+aigciqa2023:C:\\x", "csv:my+ratings.csv"]
    assert parse_stages(specs) == [
        [("agiqa-1k", "data/1k")],
        [("agiqa-3k", "/a+b/3k"), ("aigciqa2023", "C:\\x")],
        [("csv", "my+ratings.csv")],
    ]
    for bad, found in {
        "agiqa3k:p": "unknown set 'agiqa3k'",
        "agiqa-3k": "without a path",
        "csv:": "without a path",
    }.items():
        with pytest.raises(ValueError, match=found):
            parse_stages(["agiqa-1k:p", bad])
    with pytest.raises(ValueError, match="found none"):
        parse_stages([])


def test_one_value_or_one_for_each_stage():
    assert value_per_stage("learning_rate", [1e-5], 3) == [1e-5] * 3
    assert value_per_stage("learning_rate", [3, 2, 1], 3) == [3, 2, 1]
    with pytest.raises(
        ValueError, match="--learning_rate: expected one value, or one for each of the 3 stages, found 1 2"
    ):
        value_per_stage("learning_rate", [1, 2], 3)


def test_rows_of_a_stage(tmp_path):
    """Sets of two scales in one table, each row knowing its set; a limit counts for each set."""
    first, second = write_set(tmp_path / "first"), write_set(tmp_path / "second", number=24, seed=1)
    (one, both) = read_stages([f"csv:{first}", f"csv:{first}+csv:{second}"], split_seed=1)
    assert one.names == ("first",) and both.names == ("first", "second") and both.scales == ((0.0, 5.0),) * 2
    assert {split: len(rows) for split, rows in both.splits.items()} == {"train": 32, "validation": 4, "test": 4}
    for index, name in enumerate(both.names):
        rows = both.splits["train"].select(both.of_set("train", index))
        assert all(cell["bytes"] is None and f"/{name}/" in cell["path"] for cell in rows["image"])
    # The same set is split the same way in every stage: what one stage tests on, none trains on.
    assert one.splits["test"]["mos"][:] == both.splits["test"].select(both.of_set("test", 0))["mos"][:]
    limited = read_stages([f"csv:{first}+csv:{second}"], max_samples={"train": 5, "validation": None})[0]
    assert [len(limited.of_set("train", index)) for index in (0, 1)] == [5, 5]

    assert both.splits["test"]["reference"][:] == [None] * 4

    with pytest.raises(ValueError, match="--target: expected one value, or one for each of the 1 stages"):
        read_stages([f"csv:{first}"], targets=["quality", "alignment"])
    (tmp_path / "first/3.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="3.png"):
        read_stages([f"csv:{first}"])


def test_names_that_repeat_and_scores_that_cannot_rank(tmp_path):
    path = write_set(tmp_path / "set")
    stage = read_stages([f"csv:{path}+csv:{path}"])[0]
    assert stage.names == ("set", "set-2") and len(stage.splits["train"]) == 24
    rows = Dataset.from_dict({"image": [str(tmp_path / "set/0.png")], "prompt": ["a"], "mos": [1.0]})
    lonely = RatingSet(
        "csv", "quality", (0.0, 5.0), DatasetDict(dict.fromkeys(("train", "validation", "test"), rows)), ()
    )
    with pytest.raises(ValueError, match="alone, validation: expected two different scores to rank, found 1 rows"):
        join_sets([lonely], ["alone"])


def test_the_steps_of_each_stage():
    """Of epochs, the last of which is filled up, or as given; samples are counted from the stage's start."""
    stages = [Stage(("set",), ((0.0, 5.0),), {"train": [None] * rows}, number) for number, rows in ((1, 10), (2, 16))]
    args = Namespace(max_train_steps=None, num_train_epochs=[3, 2])
    first, second = set_steps(stages, samples_per_step=4, args=args)
    assert (first.start, first.end, second.start, second.end) == (0, 9, 9, 17) and args.max_train_steps == [9, 8]
    assert second.samples(9, 4) == range(0, 32) and second.samples(16, 4) == range(28, 32)
    first, second = set_steps(
        stages, samples_per_step=4, args=Namespace(max_train_steps=[2, 3], num_train_epochs=[3, 2])
    )
    assert (first.end, second.start, second.end, second.number) == (2, 2, 5, 2)


def test_a_row_has_a_place_on_its_sets_scale():
    both = Stage(("one", "two"), ((0.0, 5.0), (20.0, 100.0)), None)
    assert both.target({"set": 1, "mos": 40.0}, "mos") == (1, 0.25)
    assert Stage(("one",), ((1.0, 5.0),), None).target({"score": 4.0}, "score") == (0, 0.75)


def test_a_checkpoint_belongs_to_the_stage_it_was_written_in(tmp_path):
    args = Namespace(output_dir=tmp_path, stages=["a", "b"], max_train_steps=None)

    def stages(*ends):
        return [Stage((), (), None, i + 1, start, end) for i, (start, end) in enumerate(zip([0, *ends], ends))]

    assert resumed_step(None, stages(4, 9), args) == 0
    for stage in (1, 2):
        step = 3 + stage
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        state = {"step": step, "settings": {}, "best": Best(stage).state_dict()}
        (checkpoint / "run_state.json").write_text(json.dumps(state))
        if stage == 2:
            with pytest.raises(
                ValueError, match="comes after stage 1: expected its report .*metrics.json, found none"
            ):
                resumed_step(checkpoint, stages(4, 9), args)
            (tmp_path / "stage-1").mkdir()
            (tmp_path / "stage-1/metrics.json").touch()
        assert resumed_step(checkpoint, stages(4, 9), args) == step
        other = (9, 12) if stage == 2 else (3, 9)
        with pytest.raises(
            ValueError,
            match=f"written in stage {stage} and now belongs to stage {3 - stage}, .* {other[0]}, {other[1]}:",
        ):
            resumed_step(checkpoint, stages(*other), args)
    with pytest.raises(ValueError, match="is already at step 5 of --max_train_steps 4"):
        resumed_step(checkpoint, stages(3, 4), args)
    assert resumed_step(checkpoint, stages(4, 5), args) == 5  # its report is still to come
    (tmp_path / "metrics.json").touch()
    with pytest.raises(ValueError, match="is already at step 5 of --max_train_steps 5"):
        resumed_step(checkpoint, stages(4, 5), args)
    (checkpoint / "run_state.json").unlink()
    with pytest.raises(ValueError, match="has no run_state.json: it is incomplete"):
        resumed_step(checkpoint, stages(4, 9), args)


def test_the_best_validation_and_its_state():
    """The first counts whatever it is; after it only what is above; a state comes back from JSON as it was."""
    best, lines = Best(2), [(0.5, 0.25), (1.5, -0.125)]
    nan = {"set": {"srcc": math.nan, "plcc": math.nan}}

    def measured(value):
        return {"one": {"srcc": value, "plcc": value}, "two": {"srcc": value, "plcc": value}}

    assert best.improve(1, nan, lines) and (best.step, best.value) == (1, None)
    assert not best.improve(2, nan, lines) and best.step == 1
    assert best.improve(3, measured(-0.5), lines) and (best.step, best.value) == (3, -0.5)
    assert not best.improve(4, nan, lines) and not best.improve(5, measured(-0.5), lines)
    assert best.improve(6, measured(0.25), lines[::-1]) and not best.improve(7, measured(0.125), lines)
    for kept in (best, Best(3)):
        text = json.dumps(kept.state_dict(), allow_nan=False)
        loaded = Best()
        loaded.load_state_dict(json.loads(text))
        assert vars(loaded) == vars(kept)


def test_maps_start_as_the_scales_and_learn_each_sets_line():
    """From one score, two sets on different scales and used differently; the slope never turns negative."""
    scores, sets = torch.rand(64, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
    maps = ScoreMaps(2)
    assert torch.equal(maps(scores, sets), scores) and maps.lines() == [(1.0, 0.0)] * 2
    assert to_scale(torch.tensor([0.0, 0.5, 1.0]), (20.0, 100.0)).tolist() == [20.0, 60.0, 100.0]
    slopes, intercepts = torch.tensor([0.5, 1.2]), torch.tensor([0.4, -0.1])
    target = slopes[sets] * scores + intercepts[sets]
    optimizer = torch.optim.Adam(maps.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (maps(scores, sets) - target).square().mean().backward()
        optimizer.step()
    assert maps.lines() == [pytest.approx((0.5, 0.4), abs=1e-3), pytest.approx((1.2, -0.1), abs=1e-3)]
    assert to_scale(torch.tensor([0.2]), (0.0, 5.0), (0.5, 0.4)).item() == pytest.approx(2.5)
    with torch.no_grad():
        maps.log_slope.fill_(-50.0)
    assert min(slope for slope, _ in maps.lines()) > 0


@pytest.mark.slow  # half a minute of processor time
def test_script_in_stages_and_resumed(tmp_path):
    """Two stages, the second of two sets; a run cut inside the second stage, and one before the first one's report, go
    on to the same weights bit for bit; a report that is there is not written anew."""
    clip = build_clip_folder(tmp_path / "clip")
    first, second = write_set(tmp_path / "first"), write_set(tmp_path / "second", levels=(0.6, 1.0), seed=1)
    # fmt: off
    flags = ["--clip_model", clip, "--stages", f"csv:{first}", f"csv:{first}+csv:{second}", "--split_seed", 1,
             "--max_train_steps", 3, 4, "--learning_rate", 1e-3, 5e-4, "--train_batch_size", 3, "--validation_steps", 2,
             "--checkpointing_steps", 2, "--num_crops", 1, "--eval_num_crops", 2, "--group_column", "generator",
             "--random_flip", "--report_to", "none"]
    # fmt: on
    whole = tmp_path / "whole"
    output = run_script(SCRIPT, *flags, "--output_dir", whole)
    assert "stage 1: first" in output and "stage 2: first, second" in output
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 3, 4, 6, 7)]
    states = {n: load_file(whole / f"checkpoint-{n}/model.safetensors") for n in (3, 7)}
    assert not torch.equal(states[3]["clip.visual.conv1.weight"], states[7]["clip.visual.conv1.weight"])
    maps = load_file(whole / "checkpoint-7/model_1.safetensors")
    assert maps["log_slope"].shape == (2,) and maps["log_slope"].abs().min() > 0

    metrics = json.loads((whole / "metrics.json").read_text())
    assert [list(stage["sets"]) for stage in metrics["stages"]] == [["first"], ["first", "second"]]
    assert metrics["stages"][0] == json.loads((whole / "stage-1/metrics.json").read_text())
    part = metrics["stages"][1]["sets"]["second"]
    assert set(part) == {"validation", "test", "map"} and set(part["test"]["groups"]) <= {"a", "b"}
    assert part["test"]["count"] == 2 and {"srcc", "plcc", "krcc", "rmse"} <= set(part["test"])
    assert part["test"]["robustness"]["count"] == 2 and part["test"]["direction"]["count"] == 0
    assert (whole / "stage-2/scatter-second.png").is_file() and (whole / "scatter-second.png").is_file()
    card = (whole / "README.md").read_text()
    assert "stage 1, first, validation" in card and "stages: first; first + second." in card
    # What is left at the end is the second stage's evaluator, without the maps.
    final = load_file(whole / "diffusion_pytorch_model.safetensors")
    assert "log_slope" not in final
    assert all(
        torch.equal(final[name], load_file(whole / "stage-2/diffusion_pytorch_model.safetensors")[name])
        for name in final
    )
    assert load_evaluator(f"ipce:{whole}").config.head == "alignment_structure"

    first_report = (whole / "stage-1/metrics.json").read_text()
    for cut_at, gone in ((4, (6, 7)), (3, (4, 6, 7))):
        cut = tmp_path / f"cut-{cut_at}"
        shutil.copytree(whole, cut)
        for number in gone:
            shutil.rmtree(cut / f"checkpoint-{number}")
        (cut / "metrics.json").unlink()
        if cut_at == 3:  # killed before the first stage's report
            shutil.rmtree(cut / "stage-2")
            (cut / "stage-1/metrics.json").unlink()
        else:
            (cut / "stage-2/metrics.json").unlink()
        run_script(SCRIPT, *flags, "--output_dir", cut, "--resume_from_checkpoint", "latest")
        resumed = load_file(cut / "checkpoint-7/model.safetensors")
        assert all(torch.equal(resumed[name], states[7][name]) for name in resumed)
        assert torch.equal(load_file(cut / "checkpoint-7/model_1.safetensors")["intercept"], maps["intercept"])
        assert (cut / "metrics.json").read_text() == (whole / "metrics.json").read_text()
        assert (cut / "stage-1/metrics.json").read_text() == first_report

    # With other numbers of steps the checkpoint would be of another stage.
    (tmp_path / "cut-4/metrics.json").unlink()
    shutil.rmtree(tmp_path / "cut-4/checkpoint-7")
    flags[flags.index("--max_train_steps") + 1] = 8
    line = refused(SCRIPT, *flags, "--output_dir", tmp_path / "cut-4", "--resume_from_checkpoint", "latest")
    assert "checkpoint-6 was written in stage 2 and now belongs to stage 1" in line
