"""FLUX.1: what the transformer is told is what its pipeline tells it, and samples are the pipeline's own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from peft import LoraConfig

from acpo_utils.anchor import base_prediction, without_adapter
from acpo_utils.data import token_ids
from acpo_utils.evaluation.denoising_error import prediction_drift
from acpo_utils.families import flux, sd3
from acpo_utils.families.latents import encode_images
from acpo_utils.flow_matching import check_late_window, denoise_late_steps, rollout_late_latents
from acpo_utils.late_step import decode_latents
from acpo_utils.lora import LORA_NAME, load_lora, read_lora_config, save_lora
from acpo_utils.losses import anchor_loss
from tests.tiny_models import save_tiny_flux, tiny_flux_transformer


PROMPTS = ["a red wall", "a house by the sea"]
LENGTH = 24  # of T5


def load(folder, max_sequence_length=LENGTH):
    return flux.load(str(folder), None, None, torch.float32, "cpu", max_sequence_length)


@pytest.fixture
def folder(tiny_flux_pipeline, tmp_path):
    return Path(shutil.copytree(tiny_flux_pipeline, tmp_path / "pipeline"))


@pytest.fixture(scope="module")
def schnell_folder(tmp_path_factory):
    """As FLUX.1-schnell: no guidance, and no shift."""
    return save_tiny_flux(
        tmp_path_factory.mktemp("tiny") / "quick",
        transformer=tiny_flux_transformer(guidance_embeds=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(tokenizers, text_encoders, prompts, guidance_scale=3.5):
    return flux.with_guidance(flux.encode_prompts(token_ids(tokenizers, prompts), text_encoders), guidance_scale)


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_encodes_them(tiny_flux_pipeline):
    _, tokenizers, text_encoders, _, _ = load(tiny_flux_pipeline)
    conditions = flux.encode_prompts(token_ids(tokenizers, PROMPTS), text_encoders)
    own = FluxPipeline.from_pretrained(tiny_flux_pipeline)
    embeds, pooled, _ = own.encode_prompt(PROMPTS, max_sequence_length=LENGTH)
    assert embeds.shape == (2, LENGTH, 48) and pooled.shape == (2, 32)
    assert torch.equal(conditions["prompt_embeds"], embeds)
    assert torch.equal(conditions["pooled_prompt_embeds"], pooled)
    for name in conditions:
        assert not torch.allclose(*conditions[name], atol=1e-3), "captions differ"
    kept = flux.encode_prompts(conditions | {"prompts": PROMPTS}, None)
    assert all(kept[name] is conditions[name] for name in conditions)


@pytest.mark.parametrize("quick", [False, True], ids=["dev", "schnell"])
@torch.no_grad()
def test_a_rollout_and_the_steps_after_it_are_the_pipelines_own_latents(tiny_flux_pipeline, schnell_folder, quick):
    """Of pictures that are not square. Packing, positions, the shift, the sign of v and guidance are all in it."""
    folder = schnell_folder if quick else tiny_flux_pipeline
    noise_scheduler, tokenizers, text_encoders, vae, transformer = load(folder)
    conditions = encoded(tokenizers, text_encoders, PROMPTS)

    def predict(latents, sigmas):
        return flux.predict(transformer, latents, sigmas, conditions)

    sampled = {"num_inference_steps": 6, "height": 32, "width": 48, "max_sequence_length": LENGTH}
    noise = torch.randn(2, 16, 16, 24, generator=torch.Generator().manual_seed(0))
    packed, seen = FluxPipeline._pack_latents(noise, *noise.shape), []

    def keep(pipeline, step, timestep, values):
        seen.append(FluxPipeline._unpack_latents(values["latents"], 32, 48, 2))
        return values

    own = quiet(FluxPipeline.from_pretrained(folder))
    expected = own(PROMPTS, **sampled, latents=packed, output_type="pt", callback_on_step_end=keep).images
    schedule = flux.schedule(noise_scheduler, noise.shape, 6)
    torch.testing.assert_close(schedule, own.scheduler.sigmas, atol=1e-7, rtol=0)
    stop = int((1000 * schedule >= 600).sum())
    assert 0 < stop < 5
    latents, sigmas = rollout_late_latents(predict, schedule, noise, tmax=600)
    torch.testing.assert_close(latents, seen[stop - 1], atol=1e-5, rtol=1e-5)
    last, sigmas = rollout_late_latents(predict, schedule, noise, tmax=int(1000 * schedule[-3]))
    assert torch.equal(sigmas, schedule[-2].repeat(2))
    last = denoise_late_steps(None, predict(last, sigmas), sigmas, last)
    torch.testing.assert_close(last, seen[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_latents(vae, last), expected, atol=1e-4, rtol=0)

    ours = quiet(flux.build_pipeline(transformer, vae, text_encoders, tokenizers, noise_scheduler))
    picture = ours(PROMPTS, **sampled, latents=packed, output_type="pt").images
    torch.testing.assert_close(picture, expected, atol=1e-6, rtol=0)
    other = flux.predict(transformer, noise, schedule[:1].repeat(2), flux.with_guidance(conditions, 1.0))
    assert torch.allclose(other, predict(noise, schedule[:1].repeat(2)), atol=1e-4) == quick, (
        "guidance is told, or not"
    )


def test_decode_of_encode_is_the_vaes_round_trip(tiny_flux_pipeline):
    vae = load(tiny_flux_pipeline)[3]
    vae.encoder.conv_out.bias.data[16:] = -60  # a posterior without spread: its sample is its mean
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
        own = (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
        latents = encode_images({"pixel_values": pixels}, vae, None)
        torch.testing.assert_close(latents, (mean - 0.1159) * 0.3611, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decode_latents(vae, latents), own, atol=1e-5, rtol=1e-5)


def inputs(conditions):
    return (
        torch.randn(2, 16, 16, 24, generator=torch.Generator().manual_seed(3)),
        torch.tensor([0.02, 0.24]),
        conditions,
    )


def test_the_anchor_is_0_at_the_start_and_every_lora_tensor_has_a_gradient(tiny_flux_pipeline):
    _, tokenizers, text_encoders, _, transformer = load(tiny_flux_pipeline)
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=flux.TARGETS.split(",")))
    given = inputs(encoded(tokenizers, text_encoders, PROMPTS))
    base = base_prediction(transformer, *given, predict=flux.predict)
    assert anchor_loss(flux.predict(transformer, *given), base).item() == 0.0
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    transformer.enable_gradient_checkpointing()
    base = base_prediction(transformer, *given, predict=flux.predict)
    anchor_loss(flux.predict(transformer, *given), base).backward()
    for name, parameter in transformer.named_parameters():
        assert ("lora_" in name) == (parameter.grad is not None and parameter.grad.abs().sum().item() > 0), name
    assert sum("lora_" in name for name, _ in transformer.named_parameters()) == 2 * (8 + 3), "single blocks as well"


def test_a_lora_of_another_alpha_than_rank_is_the_same_in_the_pipeline(tiny_flux_pipeline, tmp_path):
    _, tokenizers, text_encoders, _, transformer = load(tiny_flux_pipeline)
    targets = ["attn.to_q", "attn.add_k_proj", "attn.to_out.0", "ff.net.2"]
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False))
    save_lora(transformer, tmp_path, FluxPipeline)
    assert read_lora_config(tmp_path, FluxPipeline) == {"rank": 3, "alpha": 7, "target_modules": sorted(targets)}
    given = inputs(encoded(tokenizers, text_encoders, PROMPTS))
    own = FluxPipeline.from_pretrained(tiny_flux_pipeline)
    own.load_lora_weights(tmp_path, weight_name=LORA_NAME)
    again = tiny_flux_transformer()
    again.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=targets))
    load_lora(again, tmp_path, pipeline_class=FluxPipeline)
    with torch.no_grad():
        expected = flux.predict(transformer, *given)
        for other in (own.transformer, again):
            torch.testing.assert_close(flux.predict(other, *given), expected, atol=1e-6, rtol=0)
        with without_adapter(transformer) as base:
            assert not torch.allclose(flux.predict(base, *given), expected, atol=1e-3)


def test_the_drift_is_told_the_scale_of_sampling(tiny_flux_pipeline, monkeypatch):
    noise_scheduler, tokenizers, text_encoders, vae, transformer = load(tiny_flux_pipeline)
    transformer.add_adapter(LoraConfig(r=3, target_modules=["attn.to_q", "attn.to_v"], init_lora_weights=False))
    pipeline = flux.build_pipeline(transformer, vae, text_encoders, tokenizers, noise_scheduler)
    told, forward = [], transformer.forward

    def noting(*args, guidance, **kwargs):
        told.extend(guidance.tolist())
        return forward(*args, guidance=guidance, **kwargs)

    monkeypatch.setattr(transformer, "forward", noting)

    def predictor(*given):
        return flux.predictor(*given, guidance_scale=2.5, max_sequence_length=LENGTH)

    drift = prediction_drift(pipeline, torch.rand(2, 3, 32, 32), PROMPTS, predictor=predictor)
    assert (drift > 0).all() and set(told) == {2.5}


def test_a_window_that_flux_dev_does_not_visit_at_1024_pixels_is_refused_with_the_number_of_steps():
    """28 steps end at sigma 0.105 there."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    schedule = lambda steps: flux.schedule(scheduler, (1, 16, 128, 128), steps)  # noqa: E731
    assert schedule(28)[-2].item() == pytest.approx(0.105, abs=5e-4)
    check_late_window(schedule, 250, 28)
    with pytest.raises(ValueError, match="end at sigma = 0.105, none below --tmax 100 / 1000: take at least 30 steps"):
        check_late_window(schedule, 100, 28)


def test_distilled_models_are_told_by_name_card_or_schedule(folder, schnell_folder):
    noise_scheduler = load(folder)[0]
    assert flux.distilled("black-forest-labs/FLUX.1-dev", None, noise_scheduler) is None
    assert flux.distilled("black-forest-labs/FLUX.1-schnell", None, noise_scheduler) == "'schnell' is in its name"
    assert flux.distilled(schnell_folder, None, load(schnell_folder)[0]) == "its scheduler has no dynamic shift"
    (folder / "README.md").write_text("---\nbase_model: black-forest-labs/FLUX.1-schnell\n---\n")
    assert flux.distilled(str(folder), None, noise_scheduler) == "'schnell' is in its card's base_model"


def test_a_folder_of_another_family_is_refused_by_the_name_of_its_script(folder, tiny_sd3_pipeline):
    with pytest.raises(ValueError) as error:
        load(tiny_sd3_pipeline)
    assert "expected a FLUX.1 pipeline" in str(error.value) and "\n" not in str(error.value)
    assert "it is a StableDiffusion3Pipeline, for train_acpo_lora_sd3.py." in str(error.value)
    with pytest.raises(ValueError, match="it is a FluxPipeline, for train_acpo_lora_flux.py."):
        sd3.load(str(folder), None, None, torch.float32, "cpu")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "Flux2Pipeline"}))
    with pytest.raises(ValueError, match="it is a Flux2Pipeline, for diffusers' train_dreambooth_lora_flux2.py"):
        load(folder)
    with pytest.raises(ValueError, match="expected a hub id or a folder, found the single file flux.safetensors"):
        load("flux.safetensors")


def test_parts_that_do_not_fit_are_refused_before_they_are_loaded(folder):
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    config = folder / "transformer" / "config.json"
    found = json.loads(config.read_text())
    config.write_text(json.dumps(found | {"in_channels": 384}))
    with pytest.raises(ValueError, match="takes 384 channels where 2 x 2 latents of its VAE have 64: a Fill, Depth"):
        load(folder)
    config.write_text(json.dumps(found | {"pooled_projection_dim": 40}))
    with pytest.raises(ValueError, match="embeddings of 40 and 48 numbers, and its text encoders give 32 and 48"):
        load(folder)
