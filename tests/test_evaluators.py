"""Evaluators by name, each error in one line, and each violation of the contract caught."""

import json
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

import acpo_utils.evaluators
from acpo_utils.evaluators import check_evaluator, load_evaluator
from tests.tiny_clip import CAPTIONS, build_clip_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluator")
    clip = build_clip_folder(tmp_path_factory.mktemp("clip"))
    acpo_utils.evaluators.IPCE.from_open_clip(str(clip)).save_pretrained(path)
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


def test_importing_evaluators_is_light():
    """`acpo_utils.evaluators` alone imports neither open_clip nor transformers."""
    import subprocess

    code = "import sys, acpo_utils.evaluators; print([m for m in ('open_clip', 'transformers', 'diffusers') if m in sys.modules])"
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
    with pytest.raises(ValueError, match="1 missing keys, e.g. bias"):
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
