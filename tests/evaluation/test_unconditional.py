"""The final table of an unconditional model: what is measured, and which way is better."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from acpo_utils.ddpm import build_pipeline
from acpo_utils.evaluation.denoising_error import unet_denoising_error
from acpo_utils.evaluation.sampling import image_tensor, sample_unconditional
from acpo_utils.evaluation.unconditional import (
    MSE,
    compare_measures,
    judge_sets,
    sample_and_measure,
    split_judges,
    summarise_measures,
)
from acpo_utils.evaluators import TwoStreamIQA
from tests.tiny_models import tiny_unet2d


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_an_image_depends_on_the_seed_and_its_number_alone(sampler):
    """Also the noise that a DDPM draws at every step; a DDPM draws some, a DDIM does not."""
    pipeline = build_pipeline(tiny_unet2d(), DDPMScheduler(), sampler)
    images = sample_unconditional(pipeline, 5, seed=1, batch_size=2, num_inference_steps=3)
    assert images.shape == (5, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    again = sample_unconditional(pipeline, 4, seed=1, batch_size=4, num_inference_steps=3)
    assert torch.allclose(images[:4], again, atol=1e-5)
    assert not torch.allclose(images[:4], sample_unconditional(pipeline, 4, 2, 4, 3), atol=1e-2)
    assert len({image.sum().item() for image in images}) == 5


def test_images_are_one_tensor_whichever_form_the_pipeline_gives():
    images = torch.rand(2, 3, 4, 5)
    channels_last = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    for given in (images, images.double(), channels_last):
        found = image_tensor(given)
        assert torch.equal(found, images) and found.dtype == torch.float32 and found.is_contiguous()


def test_measure():
    torch.manual_seed(0)
    guide, held_out = TwoStreamIQA(widths=(4, 4, 8, 8), fusion_width=8).eval(), torch.rand(4, 3, 32, 32)
    pipeline = build_pipeline(tiny_unet2d(), DDPMScheduler(), "ddim")
    settings = {"num_images": 5, "seed": 1, "batch_size": 2, "num_inference_steps": 3, "description": "sampling"}
    judges = ({"brightness": lambda images: images.mean((1, 2, 3))}, [])
    images, values, sets = sample_and_measure(
        pipeline, DDPMScheduler(), {"guide": guide, "x": None}, judges, held_out, **settings
    )
    assert list(values) == ["guide", "brightness", MSE] and sets == {}
    with torch.no_grad():
        assert torch.allclose(values["guide"], 100 * guide.score(images), atol=1e-3), "in the guide's own range"
    assert torch.allclose(values["brightness"], images.mean((1, 2, 3)))
    assert torch.allclose(values[MSE], unet_denoising_error(pipeline.unet, DDPMScheduler(), held_out, 1))
    _, values, _ = sample_and_measure(pipeline, DDPMScheduler(), {"guide": None}, ({}, []), None, **settings)
    assert values == {}


def test_a_lower_error_is_a_win_and_a_lower_score_is_not():
    base = {"guide": torch.tensor([1.0, 2.0, 3.0, 4.0]), MSE: torch.tensor([1.0, 1.0, 1.0, 1.0])}
    tuned = {"guide": torch.tensor([2.0, 3.0, 4.0, 3.9]), MSE: torch.tensor([0.5, 0.9, 1.2, 1.0])}
    sets = {"kid": (0.5, 0.01)}, {"kid": (0.25, 0.02)}
    numbers, table = compare_measures((base, sets[0]), (tuned, sets[1]))
    guide, mse = numbers["comparisons"]["guide"], numbers["comparisons"][MSE]
    assert guide["win_rate"] == 0.75 and mse["win_rate"] == 0.5 and mse["tie_rate"] == 0.25
    assert mse["mean_difference"] == pytest.approx(-0.1)
    assert numbers["sets"] == {"kid": {"base": (0.5, 0.01), "finetuned": (0.25, 0.02)}}
    assert "| kid | 0.5000 ± 0.0100 | 0.2500 ± 0.0200 |" in table and "| guide | 2.5000 | 3.2250 |" in table


def test_a_model_without_base():
    numbers, table = summarise_measures({MSE: torch.tensor([1.0, 3.0])}, {"diversity": (0.5, 0.1)})
    assert numbers["summary"][MSE] == {"n": 2, "mean": 2.0, "std": pytest.approx(2**0.5)}
    assert f"| {MSE} | 2.0000 | 1.4142 | 2 |" in table and "| diversity | 0.5000 | 0.1000 | |" in table


def test_judges_are_sorted_and_an_unknown_one_is_refused(tmp_path):
    torch.manual_seed(0)
    TwoStreamIQA(widths=(4, 4, 8, 8), fusion_width=8).save_pretrained(tmp_path / "judge")
    name = f"two-stream:{tmp_path / 'judge'}"
    scores, sets = split_judges([name], "cpu")
    assert list(scores) == [name] and sets == []
    assert scores[name](torch.rand(3, 3, 32, 32)).shape == (3,)
    with pytest.raises(ValueError, match="'fid'"):
        split_judges(["fid"], "cpu")


def test_kid_and_diversity_run_before_training(monkeypatch):
    """A package that is missing is known at once, with the command that installs it."""
    pytest.importorskip("torchmetrics")
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("stlpips_pytorch")
    assert split_judges(["diversity", "kid"], "cpu") == ({}, ["kid", "diversity"])
    rows = judge_sets(["kid", "diversity"], torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32), 0, "cpu")
    assert list(rows) == ["KID on EfficientNet-Lite features", "diversity (shift-tolerant LPIPS)"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        split_judges(["kid"], "cpu")
