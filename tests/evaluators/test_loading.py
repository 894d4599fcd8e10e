"""Evaluators by name, each error in one line, and each violation of the contract caught."""

import contextlib
import json
import shutil
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

import acpo_utils.evaluators
from acpo_utils.evaluators import (
    TwoStreamIQA,
    WeightedEvaluators,
    check_evaluator,
    guide_parts,
    guide_weights,
    load_evaluator,
    load_guide,
)
from tests.tiny_models import CAPTIONS, build_clip_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluator")
    clip = build_clip_folder(tmp_path_factory.mktemp("clip"))
    acpo_utils.evaluators.IPCE.from_open_clip(str(clip)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def two_stream_folder(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("two-stream")
    TwoStreamIQA(widths=(4, 4, 8, 8), fusion_width=8).save_pretrained(path)
    return path


@pytest.fixture
def images():
    return torch.rand(3, 3, 20, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_metrics.py").write_text(
        "import torch\n"
        "def brightness(images, prompts=None):\n"
        "    return images.mean((1, 2, 3)) * 0.9 + 0.05\n"
        "brightness.score_range = (0.0, 10.0)\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(3, 1)\n"
        "    def forward(self, images, prompts=None):\n"
        "        return torch.sigmoid(self.linear(images.mean((2, 3)))[:, 0])\n"
        "net = Net()\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_metrics", None)


def test_ipce_by_kind_and_by_path(folder, images):
    scores = [check_evaluator(load_evaluator(spec), images, CAPTIONS) for spec in (f"ipce:{folder}", str(folder))]
    assert torch.equal(*scores) and scores[0].shape == (3,) and not scores[0].requires_grad
    evaluator = load_evaluator(str(folder), "cpu")
    assert isinstance(evaluator, acpo_utils.evaluators.IPCE) and not evaluator.training
    assert not any(parameter.requires_grad for parameter in evaluator.parameters())
    assert evaluator.score_range == (0.0, 5.0)


def test_two_stream_by_kind_and_by_path(two_stream_folder, folder):
    images = torch.rand(2, 3, 40, 36, generator=torch.Generator().manual_seed(0))
    specs = (f"two-stream:{two_stream_folder}", str(two_stream_folder))
    scores = [check_evaluator(load_evaluator(spec), images) for spec in specs]
    assert torch.equal(*scores) and scores[0].shape == (2,)
    evaluator = load_evaluator(specs[0], "cpu")
    assert isinstance(evaluator, TwoStreamIQA) and not evaluator.training and evaluator.score_range == (0.0, 100.0)
    assert not any(parameter.requires_grad for parameter in evaluator.parameters())
    with pytest.raises(ValueError, match="expected class IPCE in .* found 'TwoStreamIQA'"):
        load_evaluator(f"ipce:{two_stream_folder}")
    with pytest.raises(ValueError, match="expected class TwoStreamIQA in .* found 'IPCE'"):
        load_evaluator(f"two-stream:{folder}")


def test_pickled_weights_are_not_read(two_stream_folder, tmp_path):
    path = shutil.copytree(two_stream_folder, tmp_path / "pickled")
    torch.save(load_file(path / "diffusion_pytorch_model.safetensors"), path / "diffusion_pytorch_model.bin")
    (path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded.*safetensors"):
        load_evaluator(f"two-stream:{path}")


def test_code_beside_a_tokenizer_is_not_run(folder, tmp_path):
    """Not even if the evaluator's own configuration, which may come from a hub, asks for it."""
    path = shutil.copytree(folder, tmp_path / "hostile")
    config = json.loads((path / "config.json").read_text())
    config["clip_config"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (path / "config.json").write_text(json.dumps(config))
    settings = json.loads((path / "tokenizer/tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    (path / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    marker = tmp_path / "was_run"
    (path / "tokenizer/own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        f"open({str(marker)!r}, 'w').close()\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    with contextlib.suppress(ValueError):
        load_evaluator(f"ipce:{path}")
    assert not marker.exists()


def test_several_evaluators_are_one_guide(folder, two_stream_folder):
    images = torch.rand(3, 3, 40, 36, generator=torch.Generator().manual_seed(0), requires_grad=True)
    specs = [f"ipce:{folder}", f"two-stream:{two_stream_folder}"]
    first, second = (load_evaluator(spec) for spec in specs)
    guide = load_guide(specs, [1.4, 0.6], "cpu")
    expected = [evaluator.score(images, CAPTIONS) for evaluator in (first, second)]
    scores = guide.score(images, CAPTIONS)
    torch.testing.assert_close(scores, 0.7 * expected[0] + 0.3 * expected[1])
    names = [f"ipce-{folder.name}", f"two-stream-{two_stream_folder.name}"]
    assert list(guide.last_scores) == names and guide.score_range == (0.0, 1.0)
    for part, name in zip(expected, names):
        torch.testing.assert_close(guide.last_scores[name], part.mean().detach())
        assert not guide.last_scores[name].requires_grad
    # The gradient is the weighted sum of the parts' gradients.
    gradients = [torch.autograd.grad(part.sum(), images, retain_graph=True)[0] for part in (*expected, scores)]
    torch.testing.assert_close(gradients[2], 0.7 * gradients[0] + 0.3 * gradients[1])
    torch.testing.assert_close(check_evaluator(guide, images, CAPTIONS), scores.detach())

    parts = guide_parts(guide)
    assert list(parts) == ["guide", f"guide 0.7 {names[0]}", f"guide 0.3 {names[1]}"] and parts["guide"] is guide
    assert [part.score_range for part in parts.values()] == [(0, 1), (0, 5), (0, 100)]
    alone = load_guide(specs[:1])
    assert type(alone) is type(first) and guide_parts(alone) == {"guide": alone}


def test_a_part_that_cannot_guide_is_named(two_stream_folder):
    images = torch.rand(2, 3, 40, 36)
    dead = Function(lambda x: torch.sigmoid(x.detach().mean((1, 2, 3))))
    parts = {"good": load_evaluator(str(two_stream_folder)), "dead one": dead}
    with pytest.raises(ValueError, match="Evaluator dead one: .* found no gradient"):
        check_evaluator(WeightedEvaluators(parts, [0.5, 0.5]), images)


def test_guides_of_one_name_are_numbered(user_module, images):
    spec = "python:my_metrics:brightness"
    guide = load_guide([spec, spec, "python:my_metrics:net"])
    names = ["python-my_metrics-brightness", "python-my_metrics-brightness-2", "python-my_metrics-net"]
    assert list(guide.evaluators) == names and guide.weights == pytest.approx([1 / 3] * 3)


def test_weights_of_guides():
    assert guide_weights(["a", "b"], [3, 1]) == [0.75, 0.25]
    assert guide_weights(["a"], [0.2]) == [1.0] and guide_weights(["a", "b"]) == [0.5, 0.5] and guide_weights([]) == []
    for specs, weights, message in (
        (["a", "b"], [1.0], "one for each evaluator, found 1 for 2"),
        ([], [1.0], "one for each evaluator, found 1 for 0"),
        (["a", "b"], [1.0, 0.0], "expected weights above 0, found 1, 0"),
        (["a", "b"], [1.0, -1.0], "expected weights above 0"),
        (["a"], [float("nan")], "expected weights above 0"),
        (["a"], [float("inf")], "expected weights above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            guide_weights(specs, weights)


def test_importing_evaluators_is_light():
    """`acpo_utils.evaluators` alone imports neither open_clip nor transformers, and `metrics` not before it is used."""
    import subprocess

    code = "import sys, acpo_utils.evaluators, acpo_utils.evaluators.clip_metrics; print([m for m in ('open_clip', 'transformers', 'diffusers') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_callable_of_the_users_own(user_module, images):
    evaluator = load_evaluator("python:my_metrics:brightness")
    assert evaluator.score_range == (0.0, 10.0)
    torch.testing.assert_close(check_evaluator(evaluator, images), images.mean((1, 2, 3)) * 0.9 + 0.05)
    network = load_evaluator("python:my_metrics:net", "cpu")
    assert network.score_range == (0.0, 1.0)
    assert check_evaluator(network, images, CAPTIONS).shape == (3,)
    assert not network.function.training and not any(p.requires_grad for p in network.function.parameters())


@pytest.mark.parametrize(
    "spec, message",
    [
        ("magic:thing", "unknown kind 'magic'"),
        ("ipce:", "found no path"),
        ("two-stream:", "found no path"),
        ("two-stream:/no/such/folder", "found no folder /no/such/folder"),
        ("", "found no path"),
        ("ipce:/no/such/folder", "found no folder /no/such/folder"),
        ("/no/such/folder", "found no folder /no/such/folder"),
        ("python:my_metrics", "found no module and name"),
        ("python:my_metrics:nothing", "has no attribute 'nothing'"),
        ("python:my_metrics:number", "expected a callable"),
        ("python:my_metrics:Net", "expected a callable"),
        ("python:no_such_module:f", "No module named 'no_such_module'"),
    ],
)
def test_bad_specs(user_module, spec, message):
    with pytest.raises(ValueError, match=message) as error:
        load_evaluator(spec)
    assert "\n" not in str(error.value)


def test_wrong_folders(folder, tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="found a diffusers pipeline"):
        load_evaluator(f"ipce:{tmp_path / 'pipeline'}")
    with pytest.raises(ValueError, match="expected class IPCE.*found 'UNet2DModel'"):
        load_evaluator(str(tmp_path / "pipeline/unet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found no config.json"):
        load_evaluator(str(tmp_path / "empty"))

    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")

    def variant(name):
        path = tmp_path / name
        load_evaluator(str(folder)).save_pretrained(path)
        return path

    path = variant("incomplete")
    save_file({k: v for k, v in weights.items() if k != "bias"}, path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="1 missing tensors, e.g. bias"):
        load_evaluator(str(path))
    path = variant("cut")
    whole = (path / "diffusion_pytorch_model.safetensors").read_bytes()
    (path / "diffusion_pytorch_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_evaluator(str(path))
    assert "\n" not in str(error.value)
    path = variant("other-size")
    config["clip_config"]["embed_dim"] = 20
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_evaluator(str(path))
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_evaluator(str(path))


class Noisy:
    def score(self, images, prompts=None):
        return torch.sigmoid(images.mean((1, 2, 3)) + torch.rand(len(images)))


class Function:
    def __init__(self, function):
        self.function = function

    def score(self, images, prompts=None):
        return self.function(images)


@pytest.mark.parametrize(
    "evaluator, message",
    [
        (Function(lambda x: torch.sigmoid(x).mean()), r"one score for each image, \(3,\), found \(\)"),
        (Function(lambda x: torch.sigmoid(x).mean((2, 3))), r"one score for each image, \(3,\), found \(3, 3\)"),
        (Function(lambda x: [0.5] * len(x)), "one score for each image.*found list"),
        (Function(lambda x: x.mean((1, 2, 3)) * 5), r"scores in \(0, 1\)"),
        (Function(lambda x: x.mean((1, 2, 3)) * 0), r"scores in \(0, 1\)"),
        (Function(lambda x: x.mean((1, 2, 3)) * float("nan")), r"scores in \(0, 1\)"),
        (Function(lambda x: torch.sigmoid(x.detach().mean((1, 2, 3)))), "found no gradient"),
        (Function(lambda x: torch.sigmoid((x - x.detach()).abs().sqrt().mean((1, 2, 3)))), "finite gradient"),
        (Function(lambda x: 0.5 + 0 * x.mean((1, 2, 3))), "found zero everywhere"),
        (Noisy(), "same scores for the same images"),
    ],
)
def test_contract_violations_are_caught(evaluator, message, images):
    with pytest.raises(ValueError, match=message):
        check_evaluator(evaluator, images, CAPTIONS)


def test_images_outside_the_range_are_caught(images):
    good = Function(lambda x: torch.sigmoid(x.mean((1, 2, 3))))
    assert check_evaluator(good, images).shape == (3,)
    with torch.no_grad():  # the check needs a gradient whatever the caller's mode is
        check_evaluator(good, images)
    for bad in (images * 2 - 1, images * 255, images * float("nan")):
        with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
            check_evaluator(good, bad)
    with pytest.raises(ValueError, match="expected .batch, 3, height, width."):
        check_evaluator(good, images[0])
