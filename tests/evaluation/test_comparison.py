"""The comparison at the end of a training: what it measures is what its parts measure, and every file that it writes."""

import json
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, get_peft_model
from PIL import Image

from acpo_utils.data import fit_image
from acpo_utils.ddpm import build_pipeline
from acpo_utils.evaluation.comparison import compare_models
from acpo_utils.evaluation.denoising_error import prediction_drift, unet_denoising_error
from acpo_utils.evaluation.panel import NO_REAL, PANEL
from acpo_utils.evaluation.real_images import read_prompt_images
from acpo_utils.evaluation.sampling import sample_images, sample_unconditional
from acpo_utils.evaluation.unconditional import MSE, compare_unconditional_models
from acpo_utils.evaluators import load_evaluator
from acpo_utils.statistics import paired_comparison
from tests.tiny_models import tiny_unet2d


PROMPTS = ["a red wall", "a blue wall", "a green wall"]
GUIDE, JUDGE = "python:tests.guides:brightness", "python:tests.guides:darkness"


def move(model: torch.nn.Module) -> None:
    """Fills a LoRA that has not been trained."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)


@pytest.fixture
def pipeline(tiny_pipeline):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"]))
    move(pipeline.unet)
    return pipeline


def test_base_and_lora_are_compared_on_the_same_noise(pipeline, tmp_path, capsys):
    sampling = {"seed": 3, "batch_size": 2, "num_inference_steps": 2, "guidance_scale": 2.0}
    scorers = {"guide": load_evaluator(GUIDE), "none": None, "judge": load_evaluator(JUDGE)}
    events = {"skipped_steps": 7}
    table, pictures = compare_models(pipeline, PROMPTS, scorers, tmp_path, device="cpu", events=events, **sampling)
    images = sample_images(pipeline, PROMPTS, **sampling)
    pipeline.unet.disable_adapters()
    base = sample_images(pipeline, PROMPTS, **sampling)
    pipeline.unet.enable_adapters()
    assert not torch.equal(base, images)

    guide = paired_comparison(*(scorers["guide"].score(part) for part in (base, images)))
    judge = paired_comparison(*(scorers["judge"].score(part) for part in (base, images)))
    drift = prediction_drift(pipeline, base, PROMPTS, seed=3, batch_size=2)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics) == ["comparisons", "num_prompts", "skipped_steps", "sets"]
    assert metrics["comparisons"] == {"guide": guide, "judge": judge}
    assert metrics["num_prompts"] == 3 and metrics["skipped_steps"] == 7
    assert metrics["sets"] == {"drift": [drift.mean().item(), drift.std().item()]} and drift.mean() > 0

    out = capsys.readouterr().out
    assert out == f"\n{table}\n\nThe picture, the numbers and the LoRA are in {tmp_path.resolve()}\n{NO_REAL}\n"
    assert f"| guide | {guide['base_mean']:.4f} | {guide['finetuned_mean']:.4f} |" in table
    assert table.endswith(f"\n\nDrift (eq. 7 on noised samples of the base model, all timesteps): {drift.mean():.3g}")
    assert pictures == ["comparison.png"]
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 1000


def test_real_images_of_the_prompts_bring_the_panel(pipeline, tmp_path, capsys):
    pytest.importorskip("stlpips_pytorch")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 36, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(picture), "text": text} for picture, text in zip(pixels, PROMPTS)]
    rows.insert(1, {"image": None, "text": "a wall that nobody drew"})
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "held-out.parquet")
    prompts = [row["text"] for row in rows]
    sampling = {"seed": 3, "batch_size": 2, "num_inference_steps": 2, "guidance_scale": 2.0, "device": "cpu"}
    scorers = {"guide": load_evaluator(GUIDE)}
    table, _ = compare_models(
        pipeline, prompts, scorers, tmp_path / "out", events={}, prompt_file=tmp_path / "held-out.parquet", **sampling
    )
    panel = json.loads((tmp_path / "out" / "metrics.json").read_text())["panel"]
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    bands = [f"swd-{size >> level}" for level in range(4) if size >> level >= 16]
    assert set(panel) == {name for name in PANEL if name != "swd"} | set(bands)
    assert panel["ssim"]["n"] == 3 and panel["kid:vgg"]["n"] == 4, (
        "a prompt without a real image has no distance to it"
    )
    assert all(row["finetuned_mean"] != row["base_mean"] for row in panel.values())
    for label in ("kid:lite2 ↓", "swd-16 ↓", "ssim", "edge-energy → real"):
        assert f"| {label} |" in table
    assert NO_REAL not in capsys.readouterr().out
    real = read_prompt_images(tmp_path / "held-out.parquet", 4, (size, size))
    assert list(real) == [0, 2, 3] and real[0].shape == (3, size, size)
    expected = fit_image(Image.fromarray(pixels[1]), size, center_crop=True, random_flip=False, rng=None) / 2 + 0.5
    assert (real[2] - expected).abs().mean() < 0.05, "the same picture, cropped in another order of steps"
    assert read_prompt_images(tmp_path / "held-out.parquet", 1, (size, size)).keys() == {0}
    assert read_prompt_images("prompts.txt", 4, (size, size)) == read_prompt_images(None, 4, (size, size)) == {}


def test_without_prompts_nothing_is_compared(pipeline, tmp_path):
    found = compare_models(
        pipeline,
        [],
        {},
        tmp_path,
        seed=0,
        batch_size=2,
        num_inference_steps=2,
        guidance_scale=2.0,
        device="cpu",
        events={},
    )
    assert found == ("", []) and list(tmp_path.iterdir()) == []


@pytest.fixture
def compare_ddpm(tmp_path):
    return partial(
        compare_unconditional_models,
        partial(build_pipeline, noise_scheduler=DDPMScheduler(), sampler="ddim"),
        noise_scheduler=DDPMScheduler(),
        judges=({}, []),
        output_dir=tmp_path,
        seed=1,
        batch_size=2,
        num_inference_steps=3,
        events={"skipped_steps": 0},
    )


def test_an_unconditional_model_is_compared_with_its_lora_off(compare_ddpm, tmp_path, capsys):
    base = tiny_unet2d()
    unet = get_peft_model(tiny_unet2d(), LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv1", "conv2"]))
    move(unet)
    guide, held_out = load_evaluator(GUIDE), torch.rand(4, 3, 32, 32)
    scorers = {"guide": guide}
    table, pictures = compare_ddpm(unet=unet, base_unet=unet, scorers=scorers, held_out=held_out, num_images=5)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics) == ["num_images", "skipped_steps", "comparisons", "sets", "panel"]
    assert metrics["num_images"] == 5 and metrics["panel"]["swd-32"]["n"] == 5 and "| swd-32 ↓ |" in table

    def measured(unet):
        images = sample_unconditional(build_pipeline(unet, DDPMScheduler(), "ddim"), 5, 1, 2, 3)
        return guide.score(images), unet_denoising_error(unet, DDPMScheduler(), held_out, 1, 2)

    (base_scores, base_errors), (scores, errors) = measured(base), measured(unet.eval())
    assert not torch.equal(base_scores, scores)
    assert metrics["comparisons"] == {
        "guide": paired_comparison(base_scores, scores),
        MSE: paired_comparison(base_errors, errors, lower_is_better=True),
    }
    assert capsys.readouterr().out.endswith(
        f"\n{table}\n\nThe picture, the numbers and the pipeline are in {tmp_path.resolve()}\n"
    )
    assert pictures == ["comparison.png"] and (tmp_path / "comparison.png").stat().st_size > 5000

    # A fine-tuning of all weights has a frozen copy for its base, and gives the same.
    compare_ddpm(unet=unet, base_unet=base, scorers=scorers, held_out=held_out, num_images=5)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def test_from_scratch_there_is_no_base(compare_ddpm, tmp_path):
    held_out = torch.rand(4, 3, 32, 32)
    unet, scorers = tiny_unet2d(), {"guide": None}
    table, pictures = compare_ddpm(unet=unet, base_unet=None, scorers=scorers, held_out=held_out, num_images=4)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics) == ["num_images", "skipped_steps", "summary", "sets"] and list(metrics["summary"]) == [MSE]
    assert table.startswith("| metric | mean | std | n |")
    assert pictures == ["samples.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "samples.png"]


def test_of_no_images_nothing_is_written(compare_ddpm, tmp_path):
    unet = tiny_unet2d()
    assert compare_ddpm(unet=unet, base_unet=None, scorers={}, held_out=None, num_images=0) == ("", [])
    assert list(tmp_path.iterdir()) == []
