"""The real script: files, resume equality, stages, the demo's photographs, refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from safetensors.torch import load_file
from scipy import stats

from acpo_utils.evaluators import TwoStreamIQA, check_evaluator, load_evaluator
from tests import REPOSITORY
from tests.launching import fresh_process, launch, refused, run_script


SCRIPT = REPOSITORY / "examples" / "train_iqa_twostream.py"
WIDTHS = ["--widths", 4, 6, 8, 8, "--fusion_width", 8, "--resolution", 32, "--report_to", "none"]


def picture(rng, noise=0.0):
    """A smooth picture of one of three sizes, with noise of that standard deviation."""
    size = [(40, 56), (48, 36), (36, 36)][int(rng.integers(3))]
    coarse = PILImage.fromarray(rng.integers(60, 196, (4, 4, 3), dtype=np.uint8)).resize(size[::-1])
    return PILImage.fromarray(np.clip(np.asarray(coarse) + rng.normal(0, noise, (*size, 3)), 0, 255).astype(np.uint8))


def rated_rows(number, seed):
    """Pictures rated by their noise."""
    rng = np.random.default_rng(seed)
    noise = rng.uniform(0, 60, number)
    return [
        {"image": picture(rng, noise[i]), "mos": float(100 - noise[i]), "part": "ab"[i % 2]} for i in range(number)
    ]


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rated")
    features = Features({"image": Image(), "mos": Value("float64"), "part": Value("string")})
    for seed, (split, number) in enumerate({"train": 10, "validation": 5, "test": 8}.items()):
        Dataset.from_list(rated_rows(number, seed), features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def flags(rated, output_dir, steps=4):
    # fmt: off
    return [*WIDTHS, "--train_data_dir", rated, "--output_dir", output_dir, "--max_train_steps", steps,
            "--train_batch_size", 3, "--gradient_accumulation_steps", 2, "--learning_rate", 1e-2,
            "--lr_warmup_steps", 1, "--checkpointing_steps", 2, "--validation_steps", 1, "--group_column", "part"]
    # fmt: on


def equal_states(*folders):
    models = [load_file(folder / "model.safetensors") for folder in folders]
    optimizers = [torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in folders]
    return all(torch.equal(models[0][name], models[1][name]) for name in models[0]) and all(
        torch.equal(value, optimizers[1][number][name])
        for number, state in optimizers[0].items()
        for name, value in state.items()
    )


def test_training_files_and_resume(rated, tmp_path):
    """Checkpoints, evaluator, metrics; a run cut at step 2 and resumed equals the uninterrupted one bit for bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = flags(rated, whole)
    options[options.index("none")] = "tensorboard"
    output = launch(SCRIPT, *options)
    assert "10 train, 5 validation, 8 test" in output
    shutil.copytree(whole, cut)
    for leftover in ("checkpoint-4", "metrics.json", "diffusion_pytorch_model.safetensors"):
        path = cut / leftover
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_script(SCRIPT, *flags(rated, cut), "--resume_from_checkpoint", "latest", "--checkpoints_total_limit", 1)
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert sorted(path.name for path in cut.glob("checkpoint-*")) == ["checkpoint-4"]
    assert equal_states(whole / "checkpoint-4", cut / "checkpoint-4")
    assert not equal_states(whole / "checkpoint-2", cut / "checkpoint-4")
    assert (whole / "metrics.json").read_text() == (cut / "metrics.json").read_text()
    assert any(whole.glob("logs/**/events.out.tfevents*"))

    # The reported numbers are those of the saved evaluator on the whole test images.
    metrics = json.loads((whole / "metrics.json").read_text())
    evaluator = load_evaluator(f"two-stream:{whole}")
    assert isinstance(evaluator, TwoStreamIQA) and tuple(evaluator.config.widths) == (4, 6, 8, 8)
    rows = Dataset.from_parquet(str(rated / "test.parquet"), cache_dir=str(tmp_path / "cache"))
    images = [torch.tensor(np.array(image), dtype=torch.float32).movedim(-1, 0)[None] / 255 for image in rows["image"]]
    check_evaluator(evaluator, images[0])
    scores, mos = [evaluator.score(image).item() * 100 for image in images], list(rows["mos"])
    assert metrics["test"]["srcc"] == pytest.approx(stats.spearmanr(scores, mos).statistic, abs=1e-4)
    assert metrics["test"]["rmse"] == pytest.approx(np.sqrt(np.mean((np.array(scores) - mos) ** 2)), rel=1e-4)
    assert metrics["test"]["rmse_logistic"] <= metrics["test"]["rmse"] + 1e-6
    assert set(metrics["test"]["groups"]) == {"a", "b"} and metrics["test"]["groups"]["a"]["count"] == 4
    with PILImage.open(whole / "scatter.png") as scatter:
        assert scatter.size[0] > 300
    card = (whole / "README.md").read_text()
    assert f"{metrics['test']['srcc']:.3f}" in card and "scatter.png" in card
    # Eight test rows, all of them attacked; they have no originals.
    assert metrics["test"]["robustness"]["srcc"] == pytest.approx(metrics["test"]["srcc"])
    assert metrics["test"]["robustness"]["count"] == 8 and metrics["test"]["direction"]["all"] is None
    for text in (card, output):
        assert "| test | 8 | 4 |" in text and "Rows without originals" in text

    assert "already at step 4" in refused(SCRIPT, *flags(rated, whole), "--resume_from_checkpoint", "latest")
    (cut / "checkpoint-4/optimizer.bin").write_bytes(b"damaged")
    assert "optimizer.bin" in refused(SCRIPT, *flags(rated, cut, steps=6), "--resume_from_checkpoint", "latest")
    assert "holds checkpoint-4 of an earlier run" in refused(SCRIPT, *flags(rated, cut))


def test_adversarial_and_resume(rated, tmp_path):
    """From a trained evaluator, attacked and by the gradient's norm: exact on resume, its batch normalisation as it was."""
    torch.manual_seed(1)
    TwoStreamIQA(widths=(4, 6, 8, 8), fusion_width=8).save_pretrained(tmp_path / "start")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["--init_evaluator", tmp_path / "start", "--adversarial_epsilon", 3, "--gradient_norm_weight", 1e-3]
    run_script(SCRIPT, *flags(rated, whole), *more, "--mixed_precision", "bf16")
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    options = [*flags(rated, cut), *more, "--mixed_precision", "bf16", "--resume_from_checkpoint", "latest"]
    line = refused(SCRIPT, *options, "--adversarial_epsilon", 0, "--gradient_norm_weight", 0)
    assert "--adversarial_epsilon 3.0 (now 0.0), --gradient_norm_weight 0.001 (now 0.0)" in line
    shutil.copytree(whole / "best", cut / "best")
    run_script(SCRIPT, *options)
    assert equal_states(whole / "checkpoint-4", cut / "checkpoint-4")
    assert (whole / "metrics.json").read_text() == (cut / "metrics.json").read_text()
    start = load_file(tmp_path / "start/diffusion_pytorch_model.safetensors")
    end = load_file(whole / "checkpoint-4/model.safetensors")
    statistics = [name for name in start if "running_" in name or "num_batches" in name]
    assert statistics and all(torch.equal(start[name], end[name]) for name in statistics)
    assert not torch.equal(start["fusion.0.weight"], end["fusion.0.weight"])


def test_the_flags_at_nothing_change_nothing(rated, tmp_path, monkeypatch):
    """Left out or 0, no adversarial part is entered, and the weights are the same bit for bit."""
    for name in ("adversarial_loss", "fix_batch_norm"):
        monkeypatch.setattr(f"acpo_utils.ratings.training.{name}", None)
    run_script(SCRIPT, *flags(rated, tmp_path / "out", steps=2))
    zeros = ["--adversarial_epsilon", 0, "--gradient_norm_weight", 0, "--max_robustness_samples", 3]
    run_script(SCRIPT, *flags(rated, tmp_path / "zeros", steps=2), *zeros)
    assert equal_states(tmp_path / "out/checkpoint-2", tmp_path / "zeros/checkpoint-2")
    counts = [json.loads((tmp_path / f"{name}/metrics.json").read_text())["test"] for name in ("out", "zeros")]
    assert [test["robustness"]["count"] for test in counts] == [8, 3]


def test_the_demo(tmp_path, monkeypatch):
    """Without data: rated photographs are made where they are not there yet, every distortion is reported, the labels are
    KADID's means."""
    pytest.importorskip("skimage")
    import train_iqa_twostream as script

    from tests.demo.kadid_table import write_kadid_table

    demo, rng = tmp_path / "demo", np.random.default_rng(9)
    demo.mkdir()
    for name in ("build_photo_ratings.py", "kadid.py", "distortions.py", "two_stream.json"):
        shutil.copy(SCRIPT.parent / "demo" / name, demo)
    for split, number in {"train": 1, "validation": 1, "test": 2}.items():
        rows = [{"image": picture(rng), "name": f"{split} {i}"} for i in range(number)]
        features = Features({"image": Image(), "name": Value("string")})
        (demo / "photos").mkdir(exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(demo / "photos" / f"{split}.parquet")
    table = write_kadid_table(tmp_path)  # a stand-in for the package with KADID's ratings
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
    monkeypatch.setattr(script, "DEMO_SETTINGS", demo / "two_stream.json")
    ratings = [demo / "photo-ratings" / f"{split}.parquet" for split in ("train", "validation", "test")]

    table.rename(table.with_suffix(".away"))
    with fresh_process(), pytest.raises(ValueError, match="build_photo_ratings.py ended in an error"):
        Accelerator()
        script.build_demo_ratings(ratings[0].parent)
    table.with_suffix(".away").rename(table)
    with fresh_process():
        options = ["--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out", "--train_batch_size", 4]
        limits = ["--max_validation_samples", 12, "--max_robustness_samples", 20]
        words = map(str, [*WIDTHS, *options, "--max_train_steps", 2, *limits])
        script.main(script.parse_args(list(words)))
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["validation"]["count"] == 12 and metrics["test"]["count"] == 250
    assert len(metrics["test"]["groups"]) == 25
    direction = metrics["test"]["direction"]  # to the photograph as it was, where a distortion shows
    assert metrics["test"]["robustness"]["count"] == 20 and 10 < direction["count"] <= 20 and direction["all"] < 0.5
    assert {group["count"] for group in metrics["test"]["groups"].values()} == {10}
    card = (tmp_path / "out/README.md").read_text()
    assert "nobody has rated these pictures" in card and "| test, lens_blur | 10 |" in card
    assert "| `num_train_epochs` | 36 |" in card and str(demo / "photos/") not in card

    made = [path.stat().st_mtime_ns for path in ratings]
    script.build_demo_ratings(ratings[0].parent)
    assert made == [path.stat().st_mtime_ns for path in ratings]  # once
    # Flags count before the demo's settings, and data of one's own is no demo.
    args = script.parse_args(["--num_train_epochs", "3", "--group_column", "level"])
    assert (args.num_train_epochs, args.group_column, args.demo) == ([3], "level", True)
    assert args.train_data_dir == str(demo / "photo-ratings")
    args = script.parse_args(["--train_data_dir", "mine"])
    assert (args.num_train_epochs, args.demo, args.data_description) == ([8], False, None)


@pytest.mark.slow
def test_stages_and_resume_in_the_second(tmp_path):
    """Two csv sets on one scale in the first stage, one in the second; a run cut in the second goes on there."""
    specs = []
    for number, name in enumerate(("one", "two", "three")):
        folder = tmp_path / name
        folder.mkdir()
        lines = ["image,prompt,mos"]
        for i, row in enumerate(rated_rows(24, seed=20 + number)):
            row["image"].save(folder / f"{i}.png")
            lines.append(f"{i}.png,prompt {i // 2},{row['mos']}")
        (folder / "ratings.csv").write_text("\n".join(lines))
        specs.append(f"csv:{folder / 'ratings.csv'}")
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def options(output_dir):
        # fmt: off
        return [*WIDTHS, "--stages", f"{specs[0]}+{specs[1]}", specs[2], "--output_dir", output_dir,
                "--max_train_steps", 2, 3, "--learning_rate", 1e-2, 1e-3, "--train_batch_size", 4,
                "--checkpointing_steps", 1, "--validation_steps", 1]
        # fmt: on

    run_script(SCRIPT, *options(whole))
    metrics = json.loads((whole / "metrics.json").read_text())["stages"]
    assert [list(report["sets"]) for report in metrics] == [["ratings", "ratings-2"], ["ratings"]]
    assert all("map" in measured for report in metrics for measured in report["sets"].values())
    assert (whole / "stage-1/scatter-ratings-2.png").is_file() and (whole / "stage-2/metrics.json").is_file()
    assert torch.equal(
        load_file(whole / "diffusion_pytorch_model.safetensors")["fusion.0.weight"],
        load_file(whole / "stage-2/diffusion_pytorch_model.safetensors")["fusion.0.weight"],
    )
    shutil.copytree(whole, cut)
    for leftover in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(cut / leftover)
    (cut / "metrics.json").unlink()
    (cut / "stage-2/metrics.json").unlink()
    run_script(SCRIPT, *options(cut), "--resume_from_checkpoint", "latest")
    assert equal_states(whole / "checkpoint-5", cut / "checkpoint-5")
    assert json.loads((cut / "metrics.json").read_text())["stages"] == metrics


def test_ten_steps_that_are_not_finite_end_the_run(rated, tmp_path, monkeypatch):
    loss = torch.nn.functional.l1_loss
    monkeypatch.setattr(torch.nn.functional, "l1_loss", lambda *tensors: loss(*tensors) * float("nan"))
    options = flags(rated, tmp_path / "out", steps=12)
    options[options.index("--validation_steps") + 1] = 100
    options[options.index("--checkpointing_steps") + 1] = 1
    assert "not finite in ten steps in a row, up to step 10" in refused(SCRIPT, *options)
    # Every step was skipped: what is trained is the same in the first checkpoint and in the last.
    first, last = (load_file(tmp_path / f"out/checkpoint-{step}/model.safetensors") for step in (1, 9))
    assert all(torch.equal(first[name], last[name]) for name in first if "running" not in name and "num_" not in name)


def test_refusals(rated, tmp_path):
    """Each bad input ends in one line that says what was expected, before any training."""
    out = [*WIDTHS, "--output_dir", tmp_path / "out", "--max_train_steps", 1]
    assert "no/such" in refused(SCRIPT, *out, "--train_data_dir", "no/such")
    assert "--mos_column quality" in refused(SCRIPT, *out, "--train_data_dir", rated, "--mos_column", "quality")
    assert "from 0 to 1" in refused(SCRIPT, *out, "--train_data_dir", rated, "--mos_range", 0, 1)
    assert "several" in refused(SCRIPT, *out, "--train_data_dir", rated, "--dataset_name", "x/y")
    assert "expected at least 64 x 64 pixels" in refused(SCRIPT, *out, "--train_data_dir", rated, "--resolution", 64)
    assert "--group_column where" in refused(SCRIPT, *out, "--train_data_dir", rated, "--group_column", "where")
    line = refused(SCRIPT, *out, "--train_data_dir", rated, "--reference_column", "original")
    assert "--reference_column original: expected one of" in line
    assert "expected images, or reference_file_name" in refused(
        SCRIPT, *out, "--train_data_dir", rated, "--reference_column", "part"
    )
    line = refused(SCRIPT, *out, "--train_data_dir", rated, "--adversarial_epsilon", 3)
    assert "keep the statistics of batch normalisation as they are: train an evaluator without them first" in line
    assert "--gradient_norm_weight: expected at least 0" in refused(SCRIPT, *out, "--gradient_norm_weight", -1)
    assert not list(tmp_path.glob("out/checkpoint-*"))
