"""Unconditional folders: what is read and refused, what is written, and the moving average in checkpoints."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from acpo_utils.ddpm import build_pipeline, load_ddpm, new_unet, resolve_late_window, save_ddpm, usage_example
from acpo_utils.evaluation.denoising_error import unet_denoising_error
from acpo_utils.training.ema import ema_weights, register_ema_hooks
from tests import REPOSITORY
from tests.tiny_models import UNET2D_CONFIG, tiny_ddim, tiny_ddpm, tiny_unet, tiny_unet2d


def same_weights(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_pipeline_of_either_kind_and_a_unet_alone(tmp_path):
    ddpm = tiny_ddpm(tmp_path / "ddpm", num_train_timesteps=500, prediction_type="v_prediction")
    unet, scheduler, sampler = load_ddpm(ddpm)
    assert same_weights(unet, tiny_unet2d()) and sampler == "ddpm"
    assert isinstance(scheduler, DDPMScheduler) and scheduler.config.num_train_timesteps == 500
    assert scheduler.config.prediction_type == "v_prediction"
    unet, scheduler, sampler = load_ddpm(tiny_ddim(tmp_path / "ddim"))
    assert same_weights(unet, tiny_unet2d()) and sampler == "ddim" and isinstance(scheduler, DDPMScheduler)
    unet, scheduler, _ = load_ddpm(f"{ddpm}/unet")
    assert same_weights(unet, tiny_unet2d()) and scheduler is None


def test_the_old_form_without_subfolders(tmp_path):
    """google/ddpm-cifar10-32 and its like keep U-Net and scheduler beside model_index.json."""
    folder = tmp_path / "old"
    tiny_ddpm(folder, num_train_timesteps=500)
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            shutil.move(file, folder / file.name)
        (folder / part).rmdir()
    unet, scheduler, sampler = load_ddpm(str(folder))
    assert same_weights(unet, tiny_unet2d()) and scheduler.config.num_train_timesteps == 500 and sampler == "ddpm"


def test_what_is_refused(tmp_path, tiny_pipeline):
    damaged = tiny_ddpm(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(dict(list(load_file(weights).items())[1:]), weights, metadata={"format": "pt"})
    gray = tmp_path / "gray"
    tiny_unet2d(in_channels=1, out_channels=1).save_pretrained(gray)
    pickled = tmp_path / "pickled"
    tiny_unet2d().save_pretrained(pickled, safe_serialization=False)
    for path, reason in (
        (tmp_path / "nowhere", "nowhere"),
        (tiny_pipeline, "it is a StableDiffusionPipeline"),
        (damaged, "missing tensors"),
        (gray, "square RGB images, found 1 channels in"),
        (pickled, "safetensors"),
    ):
        with pytest.raises(ValueError, match="^--pretrained_model_name_or_path: expected a DDPMPipeline") as error:
            load_ddpm(str(path))
        assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_new_unet(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps({"_class_name": "UNet2DModel"} | UNET2D_CONFIG))
    assert new_unet(str(tmp_path / "tiny.json"), 64).config.sample_size == 64
    with pytest.raises(ValueError, match="--resolution must be a multiple of 2 for this U-Net, got 33"):
        new_unet(str(tmp_path / "tiny.json"), 33)
    (tmp_path / "broken.json").write_text("{")
    for name in ("nowhere.json", "broken.json"):
        with pytest.raises(ValueError, match="--model_config_name_or_path: expected the config.json") as error:
            new_unet(str(tmp_path / name), 32)
        assert "\n" not in str(error.value)


def test_the_demos_configuration_fits_the_repository():
    """At most 7 M parameters, so that fp16 takes less than 15 MB."""

    unet = new_unet(str(REPOSITORY / "examples" / "demo" / "ddpm_config.json"), 64)
    assert 2 * sum(parameter.numel() for parameter in unet.parameters()) < 14e6


@pytest.mark.parametrize("sampler, pipeline_class", [("ddpm", DDPMPipeline), ("ddim", DDIMPipeline)])
def test_save_and_load(tmp_path, sampler, pipeline_class, caplog):
    unet = tiny_unet2d()
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("of an older save")
    save_ddpm(build_pipeline(unet, DDPMScheduler(), sampler), tmp_path)
    loaded = pipeline_class.from_pretrained(tmp_path)
    assert type(loaded) is pipeline_class and same_weights(loaded.unet, unet)
    save_ddpm(build_pipeline(unet, DDPMScheduler(), sampler), tmp_path, half=True)
    stored = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, unet.state_dict()[name].half()) for name, tensor in stored.items())
    assert pipeline_class.from_pretrained(tmp_path).unet.dtype == torch.float32 and unet.dtype == torch.float32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_index.json", "scheduler", "unet"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_cards_code_runs(tmp_path, monkeypatch):
    """What the model card says about loading and fusing is true."""
    from peft import LoraConfig, get_peft_model

    from acpo_utils.ddpm import save_adapter

    monkeypatch.chdir(tmp_path)
    base = tiny_ddpm(tmp_path / "base")
    unet = get_peft_model(tiny_unet2d(), LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    save_adapter(unet, tmp_path / "out" / "lora")
    inputs = torch.randn(1, 3, 32, 32), torch.tensor([5])
    with torch.no_grad():
        expected = unet(*inputs).sample
        save_ddpm(build_pipeline(unet.merge_and_unload(), DDPMScheduler(), "ddpm"), tmp_path / "out")
        names = {}
        exec(usage_example(tmp_path / "out", base, 2), names)
        assert torch.allclose(names["pipeline"].unet(*inputs).sample, expected, atol=1e-5)
        assert torch.allclose(names["base"].unet(*inputs).sample, expected, atol=1e-5)
        assert type(names["base"].unet) is UNet2DModel and names["image"].size == (32, 32)


def averaged(steps: int):
    """A model that was moved a few times, its average, and the accelerator that stores it."""
    accelerator = Accelerator(cpu=True)
    unet = accelerator.prepare(tiny_unet2d())
    parameters = list(unet.parameters())
    ema = EMAModel(parameters, decay=0.9, use_ema_warmup=True, foreach=True)
    register_ema_hooks(accelerator, ema)
    torch.manual_seed(0)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter))
        ema.step(parameters)
    return accelerator, unet, parameters, ema


def test_the_average_is_stored_loaded_and_put_in_place(tmp_path):
    accelerator, unet, parameters, ema = averaged(5)
    accelerator.save_state(str(tmp_path / "state"))
    other, _, other_parameters, loaded = averaged(2)
    other.load_state(str(tmp_path / "state"))
    assert loaded.optimization_step == ema.optimization_step == 5
    assert all(torch.equal(a, b) for a, b in zip(loaded.shadow_params, ema.shadow_params))
    before = [parameter.detach().clone() for parameter in parameters]
    with ema_weights(ema, parameters):
        assert all(torch.equal(parameter, mean) for parameter, mean in zip(parameters, ema.shadow_params))
        assert not torch.equal(parameters[0], before[0])
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before))
    with ema_weights(None, parameters):
        assert torch.equal(parameters[0], before[0])
    for average in (ema, loaded):  # both go on alike
        average.step(parameters)
    assert all(torch.equal(a, b) for a, b in zip(loaded.shadow_params, ema.shadow_params))


def test_a_checkpoint_without_average_is_refused(tmp_path):
    accelerator, *_ = averaged(1)
    accelerator.save_state(str(tmp_path / "state"))
    (tmp_path / "state" / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match="has no ema.safetensors: its run was without --use_ema"):
        accelerator.load_state(str(tmp_path / "state"))


def test_another_kind_of_unet_is_named(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "conditional")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_ddpm(str(tmp_path / "conditional"))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_denoising_error(prediction_type):
    """Against float64 for one image; the same for each image whatever the batch; another seed asks other noise."""
    from acpo_utils.losses import diffusion_target
    from acpo_utils.randomness import step_generator

    unet, scheduler = tiny_unet2d(), DDPMScheduler(prediction_type=prediction_type, num_train_timesteps=100)
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    errors = unet_denoising_error(unet, scheduler, images, seed=3)
    assert errors.shape == (5,) and torch.allclose(
        errors, unet_denoising_error(unet, scheduler, images, 3, batch_size=2)
    )
    assert not torch.allclose(errors, unet_denoising_error(unet, scheduler, images, seed=4), atol=1e-5)
    expected = []
    for k, t in enumerate([5, 15, 25, 35, 45, 55, 65, 75, 85, 95]):
        x0, t = images[3:4] * 2 - 1, torch.tensor([t])
        noise = torch.randn(1, 3, 32, 32, generator=step_generator(3, 3, k))
        with torch.no_grad():
            pred = unet(scheduler.add_noise(x0, noise, t), t).sample.double()
        expected.append((pred - diffusion_target(scheduler, x0, noise, t).double()).square().mean())
    assert errors[3].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1000, 50, 7, 1])
def test_the_late_window_of_the_last_steps_is_the_schedulers_own(scheduler_class, spacing, steps):
    """For every N: exactly N sampling steps are below tmax, and asking back by tmax gives N."""
    noise_scheduler = scheduler_class(timestep_spacing=spacing)
    sampler = scheduler_class(timestep_spacing=spacing)
    sampler.set_timesteps(steps)
    for last_steps in {1, min(2, steps), min(10, steps), steps}:
        tmax, found = resolve_late_window(noise_scheduler, steps, last_steps=last_steps)
        below = sampler.timesteps[sampler.timesteps < tmax]
        assert found == last_steps == len(below) and torch.equal(below, sampler.timesteps[-last_steps:])
        assert resolve_late_window(noise_scheduler, steps, tmax=tmax) == (tmax, last_steps)
    assert noise_scheduler.num_inference_steps is None, "the caller's scheduler is left alone"


def test_the_late_window_by_numbers():
    scheduler = DDPMScheduler()
    assert resolve_late_window(scheduler, 1000, last_steps=10) == (10, 10), "the paper's last 10 of 1,000 steps"
    assert resolve_late_window(scheduler, 1000, last_steps=1) == (1, 1)
    assert resolve_late_window(scheduler, 50, last_steps=10) == (200, 10)
    assert resolve_late_window(scheduler, 50, tmax=100) == (100, 5)
    assert resolve_late_window(scheduler, 50) == (1000, 50) == resolve_late_window(scheduler, 50, last_steps=50)
    for arguments, message in (
        ({"last_steps": 51}, "--last_steps must be in 1..50"),
        ({"last_steps": 0}, "--last_steps must be in 1..50"),
        ({"tmax": 1001}, "--tmax must be in 1..1000"),
        ({"num_inference_steps": 1001}, "--ddpm_num_inference_steps must be in 1..1000"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_late_window(scheduler, **({"num_inference_steps": 50} | arguments))
