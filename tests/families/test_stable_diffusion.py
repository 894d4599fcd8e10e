"""A Stable Diffusion pipeline as people have it: read whole, strictly and from safetensors, or refused in one line."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file

from acpo_utils.families.latents import encode_images
from acpo_utils.families.loading import latent_scheduler
from acpo_utils.families.stable_diffusion import build_pipeline, distilled, predict
from acpo_utils.families.stable_diffusion import load as load_stable_diffusion
from acpo_utils.late_step import decode_latents, rollout_late_latents
from tests import REPOSITORY
from tests.ldm_checkpoint import save_single_file
from tests.tiny_models import tiny_unet, tiny_vae


def load(folder, variant=None):
    return load_stable_diffusion(str(folder), None, variant, torch.float32, "cpu")


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "pipeline"))


def drop_tensor(folder, part):
    file = next(Path(folder, part).glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight") and tensors[name].ndim > 1)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet"])
def test_a_missing_tensor_is_named_and_not_filled_at_random(folder, part):
    name = drop_tensor(folder, part)
    with pytest.raises(ValueError) as error:
        load(folder)
    message = str(error.value)
    assert f"{part} do not fit its config.json: 1 missing tensors" in message and "\n" not in message
    assert name.rpartition(".")[0].rpartition(".")[2] in message


@pytest.fixture
def single_file(folder):
    """One .safetensors in a folder of configurations alone, as the first repositories of Stable Diffusion have it."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    save_single_file(pipeline, folder / "model.safetensors")
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    return folder / "model.safetensors"


def test_a_single_file_is_the_folders_model(single_file, tiny_pipeline):
    noise_scheduler, _, *models = load(single_file)
    expected_scheduler, _, *expected = load(tiny_pipeline)
    assert dict(noise_scheduler.config) == dict(expected_scheduler.config)
    for model, other in zip(models, expected):
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        tensors = other.state_dict()
        assert tensors.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("part", ["model.diffusion_model.input", "first_stage_model.decoder", "cond_stage_model"])
def test_of_a_single_file_a_missing_tensor_is_no_random_one(single_file, part):
    tensors = load_file(single_file)
    del tensors[next(name for name in tensors if name.startswith(part) and tensors[name].ndim > 1)]
    save_file(tensors, single_file)
    with pytest.raises(ValueError, match="could not be loaded"):
        load(single_file)


def test_a_single_file_without_configurations_says_where_they_come_from(single_file, tmp_path):
    file = single_file.rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="put it into its model's folder, beside model_index.json"):
        load(file)


def test_pickled_weights_are_not_read(folder):
    file = next((folder / "unet").glob("*.safetensors"))
    torch.save(load_file(file), folder / "unet" / "diffusion_pytorch_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match="could not be loaded.*safetensors"):
        load(folder)
    with pytest.raises(ValueError, match="found a pickle"):
        load("model.ckpt")


def test_files_of_a_variant_are_taken_by_their_flag_which_is_named(folder):
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    with pytest.raises(ValueError, match="fp16.safetensors: give --variant fp16"):
        load(folder)
    assert len(load(folder, "fp16")) == 5


@pytest.mark.parametrize(
    "name, script",
    [
        ("StableDiffusionXLPipeline", "train_acpo_lora_sdxl.py"),
        ("ZImagePipeline", "train_acpo_lora_z_image.py"),
        ("DDPMPipeline", "train_acpo_ddpm.py"),
        ("FluxPipeline", "train_acpo_lora_flux.py"),
        ("Flux2KleinPipeline", "train_acpo_lora_flux2_klein.py"),
        ("Flux2Pipeline", "train_dreambooth_lora_flux2.py"),
        ("SanaPipeline", "it is a SanaPipeline."),
    ],
)
def test_another_familys_pipeline_names_the_script_that_is_made_for_it(folder, name, script):
    change(folder / "model_index.json", _class_name=name)
    for file in folder.glob("*/*.safetensors"):
        file.unlink()  # nothing is loaded
    with pytest.raises(ValueError, match=script):
        load(folder)


def test_parts_that_do_not_fit_each_other_are_refused_before_they_are_loaded(folder):
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    change(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(ValueError, match="takes 9 channels where its VAE has 4: an inpainting"):
        load(folder)
    change(folder / "unet" / "config.json", in_channels=4, cross_attention_dim=48)
    with pytest.raises(ValueError, match="embeddings of 48 numbers, and its text encoder gives 32"):
        load(folder)


def test_a_tokenizer_without_a_limit_has_the_text_encoders(folder):
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=None)
    assert load(folder)[1].model_max_length == 16
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=77)
    assert load(folder)[1].model_max_length == 16


def test_a_tokenizer_with_tokens_that_the_text_encoder_has_not_is_refused(folder):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<cat-toy>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(ValueError, match="the tokenizer has 515 tokens, the text encoder embeds 514"):
        load(folder)


def test_decode_of_encode_is_the_vaes_own_round_trip():
    """Also of a VAE with a shift, which is subtracted on the way in and added on the way out."""
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.3, scaling_factor=0.5)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    vae.encoder.conv_out.bias.data[4:] = -60  # a posterior without spread: its sample is its mean
    vae.quant_conv = None
    latents = encode_images({"pixel_values": pixels}, vae, None)
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
        own = (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(latents, (mean - 0.3) * 0.5, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decode_latents(vae, latents), own, atol=1e-5, rtol=1e-5)


SCHEDULERS = {
    "pndm": PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True),
    "euler": EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "dpm++": DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "zero terminal SNR": DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_a_rollout_has_the_pipelines_own_ddim_latents(folder, name):
    """Whichever scheduler the pipeline was saved with: nothing is clipped, and the timesteps are the pipeline's."""
    SCHEDULERS[name].save_pretrained(folder / "scheduler")
    change(folder / "model_index.json", scheduler=["diffusers", type(SCHEDULERS[name]).__name__])
    noise_scheduler, tokenizer, text_encoder, vae, unet = load(folder)
    assert not noise_scheduler.config.clip_sample

    own = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    own.scheduler = DDIMScheduler.from_config(own.scheduler.config, clip_sample=False)
    embeds, negative = own.encode_prompt("a red wall", "cpu", 1, True)
    seen = {}

    def keep(pipeline, step, timestep, values):
        seen[int(timestep)] = values["latents"]
        return values

    sampled = {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative,
        "num_inference_steps": 10,
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "output_type": "latent",
    }
    own.set_progress_bar_config(disable=True)
    own(**sampled, generator=torch.Generator().manual_seed(0), callback_on_step_end=keep)
    timesteps = [int(t) for t in own.scheduler.timesteps]
    latents, late = rollout_late_latents(
        partial(predict, unet),
        noise_scheduler,
        {"prompt_embeds": embeds},
        {"prompt_embeds": negative},
        (1, 4, 16, 16),
        tmax=250,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    )
    stopped = timesteps.index(int(late))
    assert timesteps[stopped] < 250 <= timesteps[stopped - 1]
    torch.testing.assert_close(latents, seen[timesteps[stopped - 1]], atol=1e-4, rtol=1e-4)
    assert latents.abs().max() > 1, "or clipping would not show"

    ours = build_pipeline(unet, vae, text_encoder, tokenizer, noise_scheduler)
    ours.set_progress_bar_config(disable=True)
    first, second = (p(**sampled, generator=torch.Generator().manual_seed(1)).images for p in (own, ours))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_latents_are_never_clipped():
    config = dict(PNDMScheduler().config)
    assert "clip_sample" not in config
    scheduler = DDIMScheduler.from_config(latent_scheduler(config).config)
    assert not scheduler.config.clip_sample and not scheduler.config.thresholding
    assert scheduler.config.steps_offset == 1


def test_distilled_models_are_told_by_name_schedule_or_unet(tiny_pipeline):
    """SD-Turbo's scheduler is "trailing" with SD-2.1's noise schedule; the demo's ends in zero SNR and is distilled from none."""
    unet = tiny_unet()
    assert distilled(tiny_pipeline, None, latent_scheduler({}), unet) is None
    assert distilled("stabilityai/sd-turbo", None, latent_scheduler({}), unet) == "'turbo' is in its name"
    turbo = latent_scheduler(EulerDiscreteScheduler(timestep_spacing="trailing").config)
    assert "trailing" in distilled(tiny_pipeline, None, turbo, unet)
    assert "guidance scale" in distilled(tiny_pipeline, None, latent_scheduler({}), tiny_unet(time_cond_proj_dim=8))
    demo = REPOSITORY / "examples" / "demo" / "pipeline"
    config = DDIMScheduler.load_config(demo, subfolder="scheduler")
    assert distilled(str(demo), None, latent_scheduler(config), unet) is None


def test_the_demos_pipeline_has_one_precision_as_the_readme_loads_it():
    """Its files are fp16; diffusers loads them as fp32, transformers as what the text encoder's config.json says."""
    pipeline = StableDiffusionPipeline.from_pretrained(REPOSITORY / "examples" / "demo" / "pipeline")
    models = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {parameter.dtype for model in models for parameter in model.parameters()} == {torch.float32}
