"""The real script on generated pictures: files, resume equality, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from safetensors.torch import load_file
from scipy import stats

import acpo_utils.ratings.agreement
from acpo_utils.evaluators import check_evaluator, load_evaluator
from tests import REPOSITORY
from tests.launching import launch, refused, run_script
from tests.tiny_models import build_clip_folder


SCRIPT = REPOSITORY / "examples" / "train_iqa_ipce.py"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "white": (240, 240, 240)}


def rated_rows(number, seed):
    """Each picture with its own colour's name and with another one's, rated by match and by noise."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(number):
        name, noise = list(COLOURS)[i % 4], float(rng.uniform(0, 60))
        size = [(20, 24), (24, 20), (16, 16)][i % 3]
        pixels = np.clip(np.array(COLOURS[name]) + rng.normal(0, noise, (*size, 3)), 0, 255).astype(np.uint8)
        image, quality = PILImage.fromarray(pixels), 5 - noise / 20
        wrong = list(COLOURS)[(i + 1) % 4]
        rows.append(
            {"image": image, "prompt": f"a {name} wall", "mos": quality, "mismatch": "none", "part": "ab"[i % 2]}
        )
        rows.append(
            {
                "image": image,
                "prompt": f"a {wrong} wall",
                "mos": quality / 2,
                "mismatch": "colour",
                "part": "ab"[i % 2],
            }
        )
    return rows


def write_rows(path, rows):
    text = {name: Value("string") for name in ("prompt", "mismatch", "part")}
    features = Features({"image": Image(), "mos": Value("float64"), **text})
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return build_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rated")
    for seed, (split, number) in enumerate({"train": 9, "validation": 4, "test": 6}.items()):
        write_rows(folder / f"{split}.parquet", rated_rows(number, seed))
    return folder


def flags(clip, rated, output_dir, steps=4):
    # fmt: off
    return ["--clip_model", clip, "--train_data_dir", rated, "--output_dir", output_dir, "--max_train_steps", steps,
            "--train_batch_size", 3, "--gradient_accumulation_steps", 2, "--learning_rate", 1e-3, "--random_flip",
            "--checkpointing_steps", 2, "--validation_steps", 1, "--group_column", "part"]
    # fmt: on


def test_training_files_and_resume(clip, rated, tmp_path):
    """Checkpoints, evaluator, metrics; a run cut at step 2 and resumed equals the uninterrupted one bit for bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    output = launch(
        SCRIPT, *flags(clip, rated, whole), "--head", "prompt_levels", "--num_crops", 2, "--eval_num_crops", 3
    )
    assert "18 train, 8 validation, 12 test" in output
    shutil.copytree(whole, cut)
    for leftover in ("checkpoint-4", "metrics.json", "diffusion_pytorch_model.safetensors"):
        path = cut / leftover
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_script(
        SCRIPT, *flags(clip, rated, cut), "--head", "prompt_levels", "--num_crops", 2, "--eval_num_crops", 3,
        "--resume_from_checkpoint", "latest", "--checkpoints_total_limit", 1,
    )  # fmt: skip
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert sorted(path.name for path in cut.glob("checkpoint-*")) == ["checkpoint-4"]
    states = [load_file(folder / "checkpoint-4/model.safetensors") for folder in (whole, cut)]
    start = load_file(clip / "open_clip_model.safetensors")
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["clip.visual.conv1.weight"], start["visual.conv1.weight"])
    assert torch.equal(states[0]["clip.logit_scale"], start["logit_scale"])
    optimizers = [torch.load(folder / "checkpoint-4/optimizer.bin", weights_only=True) for folder in (whole, cut)]
    for first, second in zip(optimizers[0]["state"].values(), optimizers[1]["state"].values()):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "metrics.json").read_text() == (cut / "metrics.json").read_text()
    assert any(whole.glob("logs/**/events.out.tfevents*"))

    # The reported numbers are those of the saved evaluator on the test rows.
    metrics = json.loads((whole / "metrics.json").read_text())
    evaluator = load_evaluator(f"ipce:{whole}")
    assert evaluator.config.head == "prompt_levels" and evaluator.config.num_crops == 3
    rows = Dataset.from_parquet(str(rated / "test.parquet"), cache_dir=str(tmp_path / "cache"))
    images = [torch.tensor(np.array(image), dtype=torch.float32).movedim(-1, 0)[None] / 255 for image in rows["image"]]
    check_evaluator(evaluator, images[0], rows["prompt"][:1])
    scores = [evaluator.score(image, [prompt]).item() * 5 for image, prompt in zip(images, rows["prompt"])]
    mos = list(rows["mos"])
    assert metrics["test"]["srcc"] == pytest.approx(stats.spearmanr(scores, mos).statistic, abs=1e-4)
    assert metrics["test"]["rmse"] == pytest.approx(np.sqrt(np.mean((np.array(scores) - mos) ** 2)), abs=1e-4)
    share = np.mean([scores[i] > scores[i + 1] for i in range(0, 12, 2)])
    assert metrics["test"]["pairs"] == {
        name: {"share": pytest.approx(share), "pairs": 6} for name in ("any", "colour")
    }
    assert set(metrics["test"]["groups"]) == {"a", "b"} and metrics["test"]["groups"]["a"]["count"] == 6
    with PILImage.open(whole / "scatter.png") as picture:
        assert picture.size[0] > 300
    card = (whole / "README.md").read_text()
    assert f"{metrics['test']['srcc']:.3f}" in card and "scatter.png" in card

    line = refused(SCRIPT, *flags(clip, rated, cut), "--head", "prompt_levels", "--resume_from_checkpoint", "latest")
    assert "--num_crops 2 (now 8), --eval_num_crops 3 (now 15): resume with the same settings" in line
    (cut / "checkpoint-4/optimizer.bin").write_bytes(b"damaged")
    line = refused(
        SCRIPT, *flags(clip, rated, cut, steps=6), "--head", "prompt_levels", "--resume_from_checkpoint", "latest"
    )
    assert "optimizer.bin" in line
    shutil.rmtree(cut / "checkpoint-4")
    line = refused(SCRIPT, *flags(clip, rated, cut), "--resume_from_checkpoint", "checkpoint-4")
    assert "found neither" in line


def test_image_folder_frozen_towers_and_default_head(clip, tmp_path):
    """Pictures with metadata.csv and no splits: prompts are split; frozen towers stay as they were; fp16 storage. The
    originals are named there."""
    folder = tmp_path / "pictures"
    (folder / "originals").mkdir(parents=True)
    lines = ["file_name,prompt,mos,reference_file_name"]
    for i, row in enumerate(rated_rows(12, seed=5)):
        row["image"].save(folder / f"{i}.png")
        PILImage.new("RGB", row["image"].size, COLOURS["red"]).save(folder / f"originals/{i}.png")
        lines.append(f"{i}.png,{row['prompt']} {i // 2},{row['mos'] * 20},originals/{i}.png")
    (folder / "metadata.csv").write_text("\n".join(lines))
    output = run_script(
        SCRIPT, "--clip_model", clip, "--train_data_dir", folder, "--output_dir", tmp_path / "out", "--mos_range", 0, 100,
        "--max_train_steps", 2, "--train_batch_size", 4, "--lock_text", "--lock_image", "--lock_image_unlocked_groups", 1,
        "--weight_dtype", "fp16", "--mixed_precision", "bf16", "--report_to", "none", "--learning_rate", 1e-2,
    )  # fmt: skip
    assert "20 train, 2 validation, 2 test" in output
    saved = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    start = load_file(clip / "open_clip_model.safetensors")
    changed = {name for name, weight in start.items() if not torch.equal(saved[f"clip.{name}"], weight.half())}
    assert changed == {"visual.proj"}
    assert saved["a"].item() != 10.0 and saved["layer_logits"].shape == (3,)
    assert load_evaluator(str(tmp_path / "out")).config.head == "alignment_structure"
    test = json.loads((tmp_path / "out/metrics.json").read_text())["test"]
    assert test["direction"]["count"] == test["robustness"]["count"] == 2 and -1 < test["direction"]["all"] < 1


def test_adversarial_and_resume(clip, rated, tmp_path):
    """Attacked in all that the CLIP looks at, and by the gradient's norm: exact on resume; not what it is without."""
    whole, cut, plain = tmp_path / "whole", tmp_path / "cut", tmp_path / "plain"
    more = ["--head", "prompt_levels", "--num_crops", 1, "--eval_num_crops", 1, "--report_to", "none"]
    robust = [*more, "--adversarial_epsilon", 2, "--gradient_norm_weight", 1e-4]
    run_script(SCRIPT, *flags(clip, rated, whole), *robust)
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    shutil.copytree(whole / "best", cut / "best")
    run_script(SCRIPT, *flags(clip, rated, cut), *robust, "--resume_from_checkpoint", "latest")
    run_script(SCRIPT, *flags(clip, rated, plain, steps=2), *more)
    ends = [load_file(run / "checkpoint-4/model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert (whole / "metrics.json").read_text() == (cut / "metrics.json").read_text()
    robust, plain = (load_file(run / "checkpoint-2/model.safetensors") for run in (whole, plain))
    assert not torch.equal(robust["clip.visual.conv1.weight"], plain["clip.visual.conv1.weight"])


def test_ten_steps_that_are_not_finite_end_the_run(clip, rated, tmp_path, monkeypatch):
    loss = torch.nn.functional.l1_loss
    monkeypatch.setattr(torch.nn.functional, "l1_loss", lambda *tensors: loss(*tensors) * float("nan"))
    options = [*flags(clip, rated, tmp_path / "out", steps=12), "--report_to", "none"]
    options[options.index("--checkpointing_steps") + 1] = 5
    line = refused(SCRIPT, *options)
    assert "not finite in ten steps in a row, up to step 10" in line
    # Every step was skipped: the checkpoint holds the CLIP that training started from.
    saved, start = (
        load_file(tmp_path / "out/checkpoint-5/model.safetensors"),
        load_file(clip / "open_clip_model.safetensors"),
    )
    assert all(torch.equal(saved[f"clip.{name}"], weight.float()) for name, weight in start.items())


def test_a_validation_without_ranks_does_not_stay_the_best(clip, rated, tmp_path, monkeypatch):
    """Constant scores have no correlation; nothing compares as above nan."""
    correlation, results = acpo_utils.statistics.correlation, []

    def first_is_nan(*values):
        results.append(correlation(*values) | ({"srcc": float("nan")} if len(results) < 2 else {}))
        return results[-1]

    monkeypatch.setattr(acpo_utils.ratings.agreement, "correlation", first_is_nan)  # called twice for each validation
    run_script(SCRIPT, *flags(clip, rated, tmp_path / "out", steps=2))
    assert json.loads((tmp_path / "out/metrics.json").read_text())["best_step"] == 2


def test_refusals(clip, rated, tmp_path):
    """Each bad input ends in one line that says what was expected, before any training."""
    out = ["--output_dir", tmp_path / "out", "--clip_model", clip]
    assert "build_labels.py" in refused(SCRIPT, *out)
    assert "no/such" in refused(SCRIPT, *out, "--train_data_dir", "no/such")
    assert "--mos_column quality" in refused(SCRIPT, *out, "--train_data_dir", rated, "--mos_column", "quality")
    line = refused(SCRIPT, *out, "--train_data_dir", rated, "--mos_range", 0, 1)
    assert "of train: expected a number from 0 to 1" in line
    assert "expected one of --stages, --train" in refused(
        SCRIPT, *out, "--train_data_dir", rated, "--stages", "agiqa-3k:x"
    )
    assert "unknown set 'agiqa3k'" in refused(SCRIPT, *out, "--stages", "agiqa3k:x")
    assert "agiqa-3k: expected a folder at x" in refused(
        SCRIPT, *out, "--stages", "agiqa-3k:x", "--max_train_steps", 5
    )
    line = refused(SCRIPT, *out, "--stages", "agiqa-3k:x", "--learning_rate", 1e-4, 1e-5)
    assert "--learning_rate: expected one value, or one for each of the 1 stages, found 0.0001 1e-05" in line
    assert "--mos_column goes with data other" in refused(
        SCRIPT, *out, "--stages", "agiqa-3k:x", "--mos_column", "score"
    )
    assert "--max_train_steps: expected at least 1" in refused(
        SCRIPT, *out, "--stages", "agiqa-3k:x", "--max_train_steps", 0
    )
    line = refused(SCRIPT, "--output_dir", tmp_path / "out", "--clip_model", tmp_path, "--train_data_dir", rated)
    assert "Cannot load CLIP" in line
    assert not list(tmp_path.glob("out/checkpoint-*"))
