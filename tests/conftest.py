"""What every test has: its environment, and the models and pictures that most of them share.

tests/tiny_models.py and tests/tiny_images.py make them, tests/launching.py runs scripts. They are imported in the fixtures:
with several test processes pytest reads this file once more, and importing diffusers takes seconds.
"""

import os
import sys

import pytest

from tests import REPOSITORY


# The scripts are modules of the tests: `import train_acpo_lora_sd as script`. The demo's import each other.
sys.path += [str(REPOSITORY / "examples"), str(REPOSITORY / "examples" / "demo")]

# Before torch is imported: one thread is several times faster than two on models this small, and nothing is fetched.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_xdist_auto_num_workers(config) -> int:
    """What `-n auto` means here: two processes, or so many as PYTEST_XDIST_AUTO_NUM_WORKERS; for one file, this one.

    One for each core would be wrong in a container, where the cores that are counted are not those that may be used. And
    each process imports torch and diffusers, which takes as long as many a file.
    """
    if len(config.args) == 1 and ".py" in config.args[0]:
        return 0
    return int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS", 2))


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> str:
    """A Stable Diffusion folder of real classes at a tiny size, with random weights."""
    from tests.tiny_models import save_tiny_pipeline

    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def tiny_sdxl_pipeline(tmp_path_factory) -> str:
    """A Stable Diffusion XL folder of real classes at a tiny size, with random weights."""
    from tests.tiny_models import save_tiny_sdxl

    return save_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def tiny_sd3_pipeline(tmp_path_factory) -> str:
    """A Stable Diffusion 3 folder of real classes at a tiny size, with random weights."""
    from tests.tiny_models import save_tiny_sd3

    return save_tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def tiny_z_image_pipeline(tmp_path_factory) -> str:
    """A Z-Image folder of real classes at a tiny size, with random weights."""
    from tests.tiny_models import save_tiny_z_image

    return save_tiny_z_image(tmp_path_factory.mktemp("tiny") / "z_image")


@pytest.fixture(scope="session")
def tiny_flux_pipeline(tmp_path_factory) -> str:
    """A FLUX.1 folder of real classes at a tiny size, with random weights."""
    from tests.tiny_models import save_tiny_flux

    return save_tiny_flux(tmp_path_factory.mktemp("tiny") / "flux")


@pytest.fixture(scope="session")
def tiny_klein_pipeline(tmp_path_factory) -> str:
    """A FLUX.2-klein folder of real classes at a tiny size, with random weights. A test of it is skipped without one."""
    pytest.importorskip("diffusers", minversion="0.37")
    from tests.tiny_models import save_tiny_klein

    return save_tiny_klein(tmp_path_factory.mktemp("tiny") / "klein")


@pytest.fixture(scope="session")
def tiny_guide(tmp_path_factory) -> str:
    """An IPCE folder around a tiny open_clip model with random weights."""
    from tests.tiny_models import save_tiny_guide

    return save_tiny_guide(tmp_path_factory.mktemp("tiny") / "guide")


@pytest.fixture(scope="session")
def captioned_images(tmp_path_factory) -> str:
    """A folder with train.parquet: twelve real-coloured 40 x 36 pictures with captions."""
    from tests.tiny_images import save_captioned_images

    return save_captioned_images(tmp_path_factory.mktemp("tiny") / "images")


@pytest.fixture
def no_estimate(monkeypatch):
    """Before it begins, a training in this process estimates no memory: that takes three times as long as the training.

    tests/training/test_memory_estimate.py tests the estimate, and that it changes nothing.
    """
    monkeypatch.setattr("acpo_utils.training.memory_estimate.memory_parts", lambda *_: {})


@pytest.fixture
def sd_flags(tiny_pipeline, tiny_guide, captioned_images, tmp_path, no_estimate):
    """The command line of a training of four steps by train_acpo_lora_sd.py, with changes; None leaves a flag out."""
    from tests.launching import command_line

    def build(output: str = "out", **changes) -> list[str]:
        options = {
            "pretrained_model_name_or_path": tiny_pipeline,
            "evaluator": f"ipce:{tiny_guide}",
            "train_data_dir": captioned_images,
            "resolution": 32,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "max_train_steps": 4,
            "report_to": "none",
            "output_dir": tmp_path / output,
        }
        return command_line(**(options | changes))

    return build


@pytest.fixture
def lora_of(tmp_path):
    """The weights of the LoRA that a run left in `tmp_path / output`."""
    from safetensors.torch import load_file

    return lambda output="out": load_file(tmp_path / output / "pytorch_lora_weights.safetensors")


@pytest.fixture(autouse=True)
def uncounted_guide(monkeypatch):
    """tests.guides counts its calls: every test counts from 0."""
    monkeypatch.setattr("tests.guides.calls", 0)
