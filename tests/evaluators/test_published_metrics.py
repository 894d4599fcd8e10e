"""CLIPScore, PickScore and pyiqa as evaluators: transformers' own numbers, the mapping to (0, 1), what is refused."""

import json
import logging
import shutil
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from acpo_utils.evaluators import check_evaluator, load_evaluator
from acpo_utils.evaluators import clip_metrics as metrics
from acpo_utils.evaluators.score_scale import to_unit_interval
from tests.tiny_models import tiny_tokenizer


PROMPTS = ["a red fox", "an owl", "a cat"]
SIDE = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP with random weights and its processor, saved as docs/evaluators.md says; it pads with its end token."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = tiny_tokenizer()
    transformer = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "bos_token_id": tokenizer.bos_token_id}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text | transformer, vision_config=vision | transformer, projection_dim=16)
    )
    with torch.no_grad():  # a little larger than at initialisation: images and prompts then differ in their scores
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.ndim > 1 else 1)
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def pictures(height, width, smooth=False):
    """Three pictures as PIL images and as the tensor (3, 3, H, W) in [0, 1] of the same 8-bit values."""
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    if smooth:
        small = [Image.fromarray(array[:4, :4]) for array in arrays]
        arrays = np.stack([np.array(image.resize((width, height), Image.Resampling.BICUBIC)) for image in small])
    return [Image.fromarray(array) for array in arrays], torch.tensor(arrays).movedim(-1, 1) / 255


@pytest.mark.parametrize("name", ["clipscore", "pickscore"])
def test_equals_transformers_own_pipeline_at_the_models_size(folder, name):
    """Within 1e-3 of a point: the same 8-bit images by processor and model of transformers, one prompt cut."""
    from transformers import CLIPImageProcessor, CLIPModel

    images, tensors = pictures(SIDE, SIDE)
    prompts = [*PROMPTS[:2], "a prompt of more than sixteen letters, every one of which is a token"]
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = tiny_tokenizer()(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        output = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    cosine = output.logits_per_image.diag() / model.logit_scale.exp()
    expected = {"clipscore": 100 * cosine, "pickscore": output.logits_per_image.diag()}[name].detach()
    assert expected.std() > 0.1, "the pictures and prompts differ in their scores"

    metric = load_evaluator(f"{name}:{folder}")
    with pytest.warns(UserWarning, match="longer than 16 tokens are truncated"):
        native = metric.native_score(tensors, prompts)
    torch.testing.assert_close(native, expected, atol=1e-3, rtol=0)
    scores = metric.score(tensors, prompts)
    low, high = metric.score_range
    assert (low, high) == {"clipscore": (0, 50), "pickscore": (10, 30)}[name]
    torch.testing.assert_close(scores, to_unit_interval(expected, low, high), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(40, 40), (60, 41), (33, 70), (12, 20)])
def test_preprocessing_of_other_sizes_equals_transformers(folder, size):
    """Within two grey levels: the processor rounds to 8 bits after resizing, which has no gradient."""
    from transformers import CLIPImageProcessor

    images, tensors = pictures(*size, smooth=True)
    processor = CLIPImageProcessor.from_pretrained(folder)
    expected = processor(images=images, return_tensors="pt").pixel_values
    found = load_evaluator(f"clipscore:{folder}").preprocess(tensors)
    assert found.shape == expected.shape == (3, 3, SIDE, SIDE)
    torch.testing.assert_close(found, expected, atol=2 / 255 / min(processor.image_std), rtol=0)


@pytest.mark.parametrize("name", ["clipscore", "pickscore"])
@pytest.mark.parametrize("size", [(SIDE, SIDE), (40, 56), (17, 31)])
def test_keeps_the_contract(folder, name, size):
    metric = load_evaluator(f"{name}:{folder}", "cpu")
    images = pictures(*size)[1].requires_grad_(True)
    scores = check_evaluator(metric, images, PROMPTS)
    assert scores.shape == (3,) and not metric.training
    assert not any(parameter.requires_grad for parameter in metric.parameters())
    metric.score(images, PROMPTS).sum().backward()
    assert images.grad.isfinite().all() and images.grad.flatten(1).any(1).all()
    if size == (40, 56):
        assert images.grad[..., 20:36].any() and not images.grad[..., :4].any(), "the centre is what is looked at"
    # Ascent along the gradient makes each score better: the sign is right.
    with torch.no_grad():
        better = metric.score(images + 0.01 * images.grad / images.grad.abs().amax((1, 2, 3), keepdim=True), PROMPTS)
    assert (better > scores).all()


def test_autocast_scores_in_fp32(folder):
    metric, (_, images) = load_evaluator(f"clipscore:{folder}"), pictures(30, 30)
    expected = metric.score(images, PROMPTS)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            scores = metric.score(images.to(dtype), PROMPTS)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, atol=0.05, rtol=0)


def test_prompts_are_encoded_once_and_cut_with_one_warning(folder):
    metric, (_, images) = load_evaluator(f"clipscore:{folder}"), pictures(SIDE, SIDE)
    calls, encode = [], metric.model.get_text_features
    metric.model.get_text_features = lambda ids, mask: calls.append(len(ids)) or encode(ids, mask)
    with torch.inference_mode():
        metric.score(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    metric.score(images.requires_grad_(True), PROMPTS).sum().backward()
    assert calls == [1, 1, 1]
    fits = "fourteen marks"  # and start and end: sixteen tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.score(images[:1], [fits.replace(" ", "")])
        metric.score(images[:1], [fits.replace(" ", "-")])
    with pytest.warns(UserWarning, match="longer than 16 tokens are truncated; first, of 17"):
        metric.score(images[:1], ["fifteenmarkssss"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.score(images[:1], ["another text that is much too long"])


def test_bad_input_is_named(folder):
    metric, (_, images) = load_evaluator(f"pickscore:{folder}"), pictures(SIDE, SIDE)
    for prompts in (None, "an owl", PROMPTS[:2]):
        with pytest.raises(ValueError, match="expected a list of 3 strings"):
            metric.score(images, prompts)
    for bad in (images[0], (images * 255).byte()):
        with pytest.raises(ValueError, match="images: expected floats"):
            metric.score(bad, PROMPTS)


def refused(spec, message):
    with pytest.raises((ValueError, ImportError), match=message) as error:
        load_evaluator(spec)
    assert "\n" not in str(error.value)


def test_folders_that_cannot_be_used(copy, tmp_path, monkeypatch):
    refused("clipscore:/no/such/folder", "found no such folder")
    refused("clipscore:", "found no path")
    weights = load_file(copy / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "visual_projection.weight"}, copy / "model.safetensors")
    refused(f"clipscore:{copy}", "1 missing keys in its weights, e.g. visual_projection.weight")
    save_file(weights | {"visual_projection.weight": torch.zeros(3, 32)}, copy / "model.safetensors")
    refused(f"clipscore:{copy}", "cannot load a CLIP from that folder")
    torch.save(weights, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    refused(f"clipscore:{copy}", "safetensors")  # a pickle lies there and is not read
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    load_evaluator(f"clipscore:{copy}")
    # As on the hub, where the processors of CLIPs are from before processor_config.json.
    preprocessing = json.loads((copy / "processor_config.json").read_text())["image_processor"]
    (copy / "processor_config.json").unlink()
    (copy / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    load_evaluator(f"clipscore:{copy}")
    larger = preprocessing | {"crop_size": {"height": 32, "width": 32}}
    (copy / "preprocessor_config.json").write_text(json.dumps(larger))
    refused(f"clipscore:{copy}", "expected a processor that .* crops to 24 x 24 pixels")
    (copy / "preprocessor_config.json").unlink()
    refused(f"clipscore:{copy}", "preprocessor_config.json")
    monkeypatch.setitem(metrics.CLIP_METRICS, "pickscore", ("acpo/no-such-clip", "acpo/no-such-clip", (10, 30)))
    refused("pickscore", "name it: pickscore:PATH")


def test_mapping_to_the_unit_interval():
    native = torch.linspace(-400, 600, 20001, dtype=torch.float64, requires_grad=True)
    scores = to_unit_interval(native, 0.0, 100.0)
    (slope,) = torch.autograd.grad(scores.sum(), native)
    assert ((scores > 0) & (scores < 1)).all() and (scores.diff() > 0).all()
    inside = (native >= 5) & (native <= 95)
    torch.testing.assert_close(scores[inside], native[inside] / 100)
    assert slope.min() > 5e-7 and torch.allclose(slope[inside], torch.full_like(slope[inside], 0.01))
    assert slope.diff().abs().max() < 5e-4, "no kink where the bend begins"
    # m^2 / (2 m - x) at x = -0.05, and its mirror image.
    for value, expected in ((-5.0, 0.05**2 / 0.15), (105.0, 1 - 0.05**2 / 0.15)):
        assert to_unit_interval(torch.tensor(value), 0.0, 100.0).item() == pytest.approx(expected)


class FakeMetric(torch.nn.Module):
    """What pyiqa.create_metric returns, as far as it is used: attributes, and a forward to (B, 1)."""

    def __init__(self, score_range, lower_better, function):
        super().__init__()
        self.score_range, self.lower_better, self.function = score_range, lower_better, function
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.weight * self.function(images).unsqueeze(1)


@pytest.fixture
def pyiqa(monkeypatch):
    """A stand-in for the package, which is not to be had in every place: only the mapping and the words are tested."""
    import os

    known = {
        "up": FakeMetric("~0, ~100", False, lambda images: 100 * images.mean((1, 2, 3))),
        "down": FakeMetric("1, 5", True, lambda images: 1 + 4 * images.mean((1, 2, 3))),
    }
    ranges = {name: metric.score_range for name, metric in known.items()}
    ranges |= {"open": "0, ~", "fails": "0, 1", "clipscore": "0, 2.5", "qalign_4bit": "1, 5"}
    module, configs = types.ModuleType("pyiqa"), types.ModuleType("pyiqa.default_model_configs")
    configs.DEFAULT_CONFIGS = {name: {"metric_mode": "NR", "score_range": text} for name, text in ranges.items()}
    configs.DEFAULT_CONFIGS["lpips"] = {"metric_mode": "FR", "score_range": "0, 1", "lower_better": True}
    module.created = []

    def create_metric(name, as_loss, loss_reduction, device):
        assert as_loss and loss_reduction == "none" and os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        module.created.append(name)
        if name not in known:
            raise OSError("no\nnetwork")
        return known[name]

    module.create_metric = create_metric
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    monkeypatch.setitem(sys.modules, "pyiqa.default_model_configs", configs)
    return module


def test_pyiqa_is_mapped_by_its_range_and_says_its_licence(pyiqa, caplog):
    import os

    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    means = images.mean((1, 2, 3))
    with caplog.at_level(logging.WARNING, logger="acpo_utils.evaluators.clip_metrics"):
        up, down = load_evaluator("pyiqa:up"), load_evaluator("pyiqa:down", "cpu")
    assert "PolyForm Noncommercial" in caplog.text and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    torch.testing.assert_close(check_evaluator(up, images), means)
    torch.testing.assert_close(check_evaluator(down, images, PROMPTS), 1 - means)
    assert up.score_range == (0, 100) and not any(parameter.requires_grad for parameter in up.parameters())
    # Higher is better in a report, whatever the metric: lower is better is reported with a minus sign.
    assert down.score_range == (-5, -1)
    low, high = down.score_range
    torch.testing.assert_close(low + (high - low) * down.score(images), -(1 + 4 * means))
    with torch.autocast("cpu", torch.bfloat16):
        assert up.score(images).dtype == torch.float32


def test_pyiqa_refusals(pyiqa, monkeypatch):
    refused("pyiqa:", "found no name")
    refused("pyiqa:nothing", "expected a no-reference metric")
    refused("pyiqa:lpips", "expected a no-reference metric")
    refused("pyiqa:open", "expected a metric with a bounded range, found '0, ~'")
    refused("pyiqa:clipscore", 'name "clipscore" instead')
    refused("pyiqa:qalign_4bit", "runs code from a hub")
    assert not pyiqa.created, "refused before anything is made: that alone could run code from a hub"
    refused("pyiqa:fails", "pyiqa cannot load it: no network")
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    refused("pyiqa:up", "pip install pyiqa")
