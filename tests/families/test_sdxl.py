"""Stable Diffusion XL: what the U-Net is told is what its pipeline tells it, and samples are the pipeline's own."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from diffusers import StableDiffusionXLPipeline as SDXL
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from acpo_utils.anchor import base_prediction
from acpo_utils.data import CachedLatents, CaptionedImages, collate, load_captioned_images, token_ids
from acpo_utils.families import sdxl, stable_diffusion
from acpo_utils.families.latents import encode_images
from acpo_utils.late_step import decode_latents, denoise_late_steps, rollout_late_latents, without_prompt
from acpo_utils.lora import load_lora, read_lora_config, save_lora
from acpo_utils.losses import anchor_loss
from tests.tiny_models import save_tiny_sdxl, tiny_sdxl_unet, tiny_vae


PROMPTS = ["a red wall", "a house by the sea"]


def load(folder, vae=None):
    return sdxl.load(str(folder), None, None, torch.float32, "cpu", vae)


@pytest.fixture
def folder(tiny_sdxl_pipeline, tmp_path):
    return Path(shutil.copytree(tiny_sdxl_pipeline, tmp_path / "pipeline"))


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl_pipeline):
    pipeline = SDXL.from_pretrained(tiny_sdxl_pipeline, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def encoded(tokenizers, text_encoders, prompts, size=(32, 32)):
    return sdxl.as_sampled(sdxl.encode_prompts(token_ids(tokenizers, prompts), text_encoders), size)


def test_prompts_are_encoded_as_the_pipeline_encodes_them(folder, pipeline):
    _, tokenizers, text_encoders, _, _, _ = load(folder)
    ids = token_ids(tokenizers, PROMPTS)
    assert set(ids) == {"input_ids", "input_ids_2"} and not torch.equal(*ids.values()), "they pad differently"
    conditions = sdxl.encode_prompts(ids, text_encoders)
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    assert embeds.shape == (2, 16, 56) and pooled.shape == (2, 20)
    assert torch.equal(conditions["prompt_embeds"], embeds) and torch.equal(conditions["pooled_prompt_embeds"], pooled)
    assert not torch.allclose(embeds[0], embeds[1], atol=1e-3)


@pytest.mark.parametrize("zeros", [True, False])
def test_no_prompt_is_the_pipelines_own(folder, zeros):
    """Zeros, or the encoding of "", as model_index.json says."""
    change(folder / "model_index.json", force_zeros_for_empty_prompt=zeros)
    _, tokenizers, text_encoders, _, _, force_zeros = load(folder)
    own = SDXL.from_pretrained(folder, add_watermarker=False)
    _, negative, _, negative_pooled = own.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    conditions = sdxl.encode_prompts(token_ids(tokenizers, PROMPTS), text_encoders)
    empty = sdxl.negative_conditions(sdxl.encode_prompts(token_ids(tokenizers, [""]), text_encoders), force_zeros)
    found = without_prompt(conditions, empty)
    torch.testing.assert_close(found["prompt_embeds"], negative, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["pooled_prompt_embeds"], negative_pooled, atol=1e-5, rtol=0)
    assert force_zeros == zeros == (not negative.any())
    (folder / "model_index.json").unlink()
    assert load(folder)[-1] is True, "a folder of the parts alone"


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@torch.no_grad()
def test_a_rollout_and_the_step_after_it_are_the_pipelines_own_ddim_latents(folder, guidance_scale):
    """Of pictures that are not square; the folder's scheduler, an Euler one, says nothing of clip_sample."""
    assert "clip_sample" not in json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    noise_scheduler, tokenizers, text_encoders, vae, unet, force_zeros = load(folder)
    size = (32, 48)
    conditions = encoded(tokenizers, text_encoders, PROMPTS, size)
    negative = sdxl.negative_conditions(encoded(tokenizers, text_encoders, [""], size), force_zeros)
    del negative["time_ids"]

    own = SDXL.from_pretrained(folder, add_watermarker=False)
    own.scheduler = DDIMScheduler.from_config(own.scheduler.config, clip_sample=False)
    own.set_progress_bar_config(disable=True)
    sampled = {"num_inference_steps": 10, "guidance_scale": guidance_scale, "height": size[0], "width": size[1]}
    expected = own(PROMPTS, **sampled, output_type="latent", generator=torch.Generator().manual_seed(0)).images

    latents, timesteps = rollout_late_latents(
        partial(sdxl.predict, unet),
        noise_scheduler,
        conditions,
        negative,
        (2, 4, 16, 24),
        tmax=2,
        num_inference_steps=10,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
    )
    assert timesteps.tolist() == [1, 1]
    pred = sdxl.predict(unet, latents, timesteps, conditions)
    if guidance_scale > 1:
        other = sdxl.predict(unet, latents, timesteps, without_prompt(conditions, negative))
        pred = other + guidance_scale * (pred - other)
    last = denoise_late_steps(None, noise_scheduler, pred, timesteps, latents)
    assert expected.abs().max() > 1, "or clipping would not show"
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)

    ours = sdxl.build_pipeline(unet, vae, text_encoders, tokenizers, noise_scheduler, force_zeros)
    ours.set_progress_bar_config(disable=True)
    pictures = [
        p(PROMPTS, **sampled, output_type="pt", generator=torch.Generator().manual_seed(1)).images for p in (own, ours)
    ]
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)
    assert ours.watermark is None


def test_what_the_unet_is_told_of_a_pictures_size_is_the_pipelines(pipeline):
    expected = pipeline._get_add_time_ids(
        (40, 60), (3, 7), (32, 32), dtype=torch.float32, text_encoder_projection_dim=20
    )
    assert torch.equal(sdxl.time_ids((40, 60), (3, 7), (32, 32))["time_ids"][None], expected)
    told = sdxl.as_sampled({"prompt_embeds": torch.zeros(2, 16, 56)}, (32, 48))["time_ids"]
    assert told.tolist() == [[32, 48, 0, 0, 32, 48]] * 2
    predictor = sdxl.predictor(pipeline, PROMPTS, (32, 48))
    latents = torch.randn(2, 4, 16, 24)
    conditions = encoded(
        [pipeline.tokenizer, pipeline.tokenizer_2], [pipeline.text_encoder, pipeline.text_encoder_2], PROMPTS
    )
    conditions["time_ids"] = told
    with torch.no_grad():
        expected = sdxl.predict(pipeline.unet, latents, torch.tensor([3, 3]), conditions)
        assert torch.equal(predictor(pipeline.unet, latents, torch.tensor([3, 3])), expected)


@pytest.mark.parametrize("center_crop", [False, True])
def test_time_ids_of_cropped_and_mirrored_items_say_where_in_the_mirrored_picture_they_lie(tmp_path, center_crop):
    """As diffusers' script, which mirrors first and crops after. Every column of the picture has its own colour."""
    ramp = np.broadcast_to(np.arange(48, dtype=np.uint8)[None, :, None] * 5, (32, 48, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a ramp"}))
    dataset = load_captioned_images(train_data_dir=str(tmp_path))
    items = CaptionedImages(
        dataset, None, 32, 60, center_crop=center_crop, random_flip=True, describe_crop=sdxl.time_ids
    )
    seen = set()
    for n in range(60):
        item = items[n]
        columns = ((item["pixel_values"][0, 0] + 1) * 127.5 / 5).round().int().tolist()
        mirrored = columns[0] > columns[-1]
        shown = list(range(48))[::-1] if mirrored else list(range(48))  # the picture, mirrored before it is cropped
        height, width, top, left, *target = item["time_ids"].int().tolist()
        assert (height, width, top, target) == (32, 48, 0, [32, 32])
        assert shown[left : left + 32] == columns
        seen.add((mirrored, left))
    assert len(seen) == 2 if center_crop else len(seen) > 12
    assert collate([items[0], items[1]])["time_ids"].shape == (2, 6)


def test_decode_of_encode_is_the_vaes_round_trip_in_fp32(folder):
    vae = load(folder)[3]
    assert vae.dtype == torch.float32 and vae.config.force_upcast and vae.config.scaling_factor == 0.13025
    vae.encoder.conv_out.bias.data[4:] = -60  # a posterior without spread: its sample is its mean
    vae.quant_conv = None
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        own = (vae.decode(vae.encode(pixels).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
        latents = encode_images({"pixel_values": pixels}, vae, None)
        torch.testing.assert_close(decode_latents(vae, latents), own, atol=1e-5, rtol=1e-5)


def test_another_vae_takes_the_pipelines_place_and_must_have_its_latents(folder, tmp_path):
    other = tiny_vae(seed=9)
    other.half().save_pretrained(tmp_path / "fp16-fix")
    vae = load(folder, str(tmp_path / "fp16-fix"))[3]
    assert vae.dtype == torch.float32 and not any(p.requires_grad for p in vae.parameters())
    assert torch.equal(vae.decoder.conv_in.weight, other.decoder.conv_in.weight.float())
    config = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4}
    AutoencoderKL(**config).save_pretrained(tmp_path / "shallow")
    with pytest.raises(
        ValueError, match="expected 4 latent channels and 2 levels as the pipeline's VAE has, found 4 and 1"
    ):
        load(folder, str(tmp_path / "shallow"))
    with pytest.raises(ValueError, match="--pretrained_vae_model_name_or_path: expected an AutoencoderKL"):
        load(folder, "no/such/vae")


def test_the_anchor_is_0_at_the_start_and_every_lora_tensor_has_a_gradient(folder):
    _, tokenizers, text_encoders, _, unet, _ = load(folder)
    unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    conditions = encoded(tokenizers, text_encoders, PROMPTS)
    inputs = torch.randn(2, 4, 16, 24), torch.tensor([3, 90]), conditions
    base = base_prediction(unet, *inputs, predict=sdxl.predict)
    assert anchor_loss(sdxl.predict(unet, *inputs), base).item() == 0.0
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    unet.enable_gradient_checkpointing()
    anchor_loss(sdxl.predict(unet, *inputs), base_prediction(unet, *inputs, predict=sdxl.predict)).backward()
    for name, parameter in unet.named_parameters():
        assert ("lora_" in name) == (parameter.grad is not None and parameter.grad.abs().sum().item() > 0), name


def test_a_lora_of_another_alpha_than_rank_is_the_same_in_the_pipeline(folder, pipeline, tmp_path):
    unet = tiny_sdxl_unet()
    targets = ["to_q", "to_k", "to_out.0", "proj_in", "ff.net.2"]
    unet.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False))
    save_lora(unet, tmp_path, SDXL)
    assert read_lora_config(tmp_path, SDXL) == {"rank": 3, "alpha": 7, "target_modules": sorted(targets)}
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([3, 90])
    conditions = {
        "prompt_embeds": torch.randn(2, 16, 56),
        "pooled_prompt_embeds": torch.randn(2, 20),
        "time_ids": sdxl.time_ids((40, 60), (3, 7), (32, 32))["time_ids"].expand(2, 6),
    }
    own = SDXL.from_pretrained(folder, add_watermarker=False)
    own.load_lora_weights(tmp_path)
    again = tiny_sdxl_unet()
    again.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=targets))
    load_lora(again, tmp_path, pipeline_class=SDXL)
    with torch.no_grad():
        expected = sdxl.predict(unet, *inputs, conditions)
        for other in (own.unet, again):
            torch.testing.assert_close(sdxl.predict(other, *inputs, conditions), expected, atol=1e-6, rtol=0)
        assert not torch.allclose(sdxl.predict(pipeline.unet, *inputs, conditions), expected, atol=1e-3)


def test_a_folder_of_another_family_is_refused_by_the_name_of_its_script(folder, tiny_pipeline):
    with pytest.raises(ValueError) as error:
        load(tiny_pipeline)
    assert "it is a StableDiffusionPipeline, for train_acpo_lora_sd.py." in str(error.value)
    with pytest.raises(ValueError) as error:
        stable_diffusion.load(str(folder), None, None, torch.float32, "cpu")
    message = str(error.value)
    assert "it is a StableDiffusionXLPipeline, for train_acpo_lora_sdxl.py." in message and "\n" not in message


def test_parts_that_do_not_fit_are_refused_before_they_are_loaded(folder):
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    change(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(ValueError, match="Stable Diffusion XL pipeline.*takes 9 channels where its VAE has 4"):
        load(folder)
    change(folder / "unet" / "config.json", in_channels=4, cross_attention_dim=48)
    with pytest.raises(ValueError, match="embeddings of 48 numbers, and its text encoder gives 56"):
        load(folder)
    change(folder / "unet" / "config.json", cross_attention_dim=56)
    change(folder / "vae" / "config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(ValueError, match="its VAE has a mean of its own for latents"):
        load(folder)


def test_a_missing_tensor_of_the_second_text_encoder_is_named(folder):
    from safetensors.torch import save_file

    (file,) = Path(folder, "text_encoder_2").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "text_projection" in name)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="text_encoder_2 do not fit its config.json: 1 missing tensors"):
        load(folder)


def test_distilled_models_are_told_by_name_card_schedule_or_unet(tmp_path):
    leading, unet = DDPMScheduler(timestep_spacing="leading"), tiny_sdxl_unet()
    trailing = DDPMScheduler(timestep_spacing="trailing")
    for name in (
        "stabilityai/sdxl-turbo",
        "ByteDance/SDXL-Lightning",
        "/models/dreamshaperXL_lightningDPMSDE.safetensors",
    ):
        assert "is in its name" in sdxl.distilled(name, None, leading, unet)
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    assert sdxl.distilled(base, None, leading, unet) is None
    assert "trailing" in sdxl.distilled(base, None, trailing, unet)
    zero_snr = DDPMScheduler(timestep_spacing="trailing", rescale_betas_zero_snr=True)
    assert sdxl.distilled(base, None, zero_snr, unet) is None
    lcm = tiny_sdxl_unet(time_cond_proj_dim=8)
    assert "guidance scale" in sdxl.distilled(base, None, leading, lcm)
    (tmp_path / "turbo" / "mine").mkdir(parents=True)  # of a folder its own name counts, and not where it lies
    assert sdxl.distilled(str(tmp_path / "turbo" / "mine"), None, leading, unet) is None
    (tmp_path / "turbo" / "mine" / "README.md").write_text("---\nbase_model: stabilityai/sdxl-turbo\n---\n")
    assert "its card's base_model" in sdxl.distilled(str(tmp_path / "turbo" / "mine"), None, leading, unet)
    scheduler = EulerAncestralDiscreteScheduler(timestep_spacing="trailing", beta_schedule="scaled_linear")
    saved = load(save_tiny_sdxl(tmp_path / "saved", scheduler=scheduler))
    assert "trailing" in sdxl.distilled(str(tmp_path / "saved"), None, saved[0], saved[4])


def test_kept_items_are_those_of_the_images_themselves(folder, tmp_path):
    """Of a picture whose crop lies elsewhere once it is mirrored, with two captions."""
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (32, 45, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": [f"wall {i}", f"door {i}"]}) for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    dataset = load_captioned_images(train_data_dir=str(tmp_path))
    _, tokenizers, text_encoders, vae, _, _ = load(folder)
    options = {"num_samples": 30, "seed": 1, "random_flip": True, "describe_crop": sdxl.time_ids}
    images = CaptionedImages(dataset, tokenizers, 32, center_crop=True, **options)
    cached = CachedLatents(dataset, tokenizers, 32, tmp_path / "latents", **options)
    cached.build(vae, text_encoders, Accelerator(cpu=True), sdxl.encode_prompts)
    batch, kept = (collate([items[n] for n in range(30)]) for items in (images, cached))
    assert torch.equal(kept["time_ids"], batch["time_ids"])
    assert set(batch["time_ids"][:, 3].tolist()) == {6, 7} and kept["prompts"] == batch["prompts"]
    for name, value in sdxl.encode_prompts(batch, text_encoders).items():
        torch.testing.assert_close(kept[name], value, atol=1e-5, rtol=0)
