"""Stable Diffusion 3: what the transformer is told is what its pipeline tells it, and samples are the pipeline's own."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from diffusers import StableDiffusion3Pipeline as SD3
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from acpo_utils.anchor import base_prediction, without_adapter
from acpo_utils.data import CaptionedImages, load_captioned_images, token_ids
from acpo_utils.evaluation.denoising_error import prediction_drift
from acpo_utils.families import sd3, sdxl
from acpo_utils.families.latents import encode_images
from acpo_utils.flow_matching import add_noise, denoise_late_steps, rollout_late_latents
from acpo_utils.late_step import decode_latents, lora_below, without_prompt
from acpo_utils.lora import LORA_NAME, load_lora, read_lora_config, save_lora
from acpo_utils.losses import anchor_loss
from tests.tiny_models import save_tiny_sd3, tiny_sd3_transformer


PROMPTS = ["a red wall", "a house by the sea"]
LENGTH = 24  # of T5


def load(folder, max_sequence_length=LENGTH):
    return sd3.load(str(folder), None, None, torch.float32, "cpu", max_sequence_length)


@pytest.fixture(scope="module")
def folder_without_t5(tmp_path_factory):
    return save_tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3", text_encoder_3=None, tokenizer_3=None)


@pytest.fixture
def folder(tiny_sd3_pipeline, tmp_path):
    return Path(shutil.copytree(tiny_sd3_pipeline, tmp_path / "pipeline"))


@pytest.fixture(params=[True, False], ids=["T5", "no T5"])
def either_folder(request, tiny_sd3_pipeline, folder_without_t5):
    return tiny_sd3_pipeline if request.param else folder_without_t5


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def encoded(tokenizers, text_encoders, prompts):
    return sd3.encode_prompts(token_ids(tokenizers, prompts), text_encoders)


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_encodes_them(either_folder, folder_without_t5):
    _, tokenizers, text_encoders, _, _ = load(either_folder)
    ids = token_ids(tokenizers, PROMPTS)
    with_t5 = either_folder != folder_without_t5
    assert ("input_ids_3" in ids) == with_t5 and not torch.equal(ids["input_ids"], ids["input_ids_2"])
    conditions = sd3.encode_prompts(ids, text_encoders)
    own = SD3.from_pretrained(either_folder, **({} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}))
    embeds, negative, pooled, negative_pooled = own.encode_prompt(PROMPTS, None, None, max_sequence_length=LENGTH)
    assert embeds.shape == (2, 16 + LENGTH, 64) and pooled.shape == (2, 40)
    assert torch.equal(conditions["prompt_embeds"], embeds)
    assert torch.equal(conditions["pooled_prompt_embeds"], pooled)
    assert embeds[:, 16:].any() == with_t5 and not torch.allclose(embeds[0], embeds[1], atol=1e-3)
    empty = without_prompt(conditions, encoded(tokenizers, text_encoders, [""]))
    torch.testing.assert_close(empty["prompt_embeds"], negative, atol=1e-5, rtol=0)
    torch.testing.assert_close(empty["pooled_prompt_embeds"], negative_pooled, atol=1e-5, rtol=0)
    kept = sd3.encode_prompts(conditions | {"prompts": PROMPTS}, None)
    assert all(kept[name] is conditions[name] for name in conditions)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
@pytest.mark.parametrize("dynamic", [False, True], ids=["shift 3", "dynamic shift"])
@torch.no_grad()
def test_a_rollout_and_the_steps_after_it_are_the_pipelines_own_latents(folder, guidance_scale, dynamic):
    """Of pictures that are not square. The clock, the shift, the sign of v and guidance are all in it."""
    if dynamic:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.4, max_shift=1.3)
        scheduler.save_pretrained(folder / "scheduler")
    noise_scheduler, tokenizers, text_encoders, vae, transformer = load(folder)
    conditions = encoded(tokenizers, text_encoders, PROMPTS)
    negative = without_prompt(conditions, encoded(tokenizers, text_encoders, [""]))

    def predict(latents, sigmas):
        positive = sd3.predict(transformer, latents, sigmas, conditions)
        if guidance_scale <= 1:
            return positive
        other = sd3.predict(transformer, latents, sigmas, negative)
        return other + guidance_scale * (positive - other)

    sampled = {
        "num_inference_steps": 6,
        "guidance_scale": guidance_scale,
        "height": 32,
        "width": 48,
        "max_sequence_length": LENGTH,
    }
    noise = torch.randn(2, 16, 16, 24, generator=torch.Generator().manual_seed(0))
    own, seen = quiet(SD3.from_pretrained(folder)), []

    def keep(pipeline, step, timestep, values):
        seen.append(values["latents"])
        return values

    expected = own(PROMPTS, **sampled, latents=noise, output_type="latent", callback_on_step_end=keep).images
    schedule = sd3.schedule(noise_scheduler, noise.shape, 6)
    assert torch.equal(schedule, own.scheduler.sigmas)
    stop = int((1000 * schedule >= 700).sum())
    assert 0 < stop < 5
    latents, sigmas = rollout_late_latents(predict, schedule, noise, tmax=700)
    torch.testing.assert_close(latents, seen[stop - 1], atol=1e-5, rtol=1e-5)
    assert torch.equal(sigmas, schedule[stop].repeat(2))
    last, sigmas = rollout_late_latents(predict, schedule, noise, tmax=int(1000 * schedule[-3]))
    assert torch.equal(sigmas, schedule[-2].repeat(2))
    last = denoise_late_steps(None, predict(last, sigmas), sigmas, last)
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)

    ours = quiet(sd3.build_pipeline(transformer, vae, text_encoders, tokenizers, noise_scheduler))
    pictures = [p(PROMPTS, **sampled, latents=noise, output_type="pt").images for p in (own, ours)]
    torch.testing.assert_close(*pictures, atol=1e-6, rtol=0)
    torch.testing.assert_close(decode_latents(vae, last), pictures[0], atol=1e-4, rtol=0)
    assert len(noise_scheduler.sigmas) == 1000, "the training's own is not sampled with"


def test_a_caption_that_t5_reads_to_its_end_is_not_called_truncated(tiny_sd3_pipeline, captioned_images, caplog):
    """Both CLIPs read 3 tokens, T5 as many as it is told."""
    _, tokenizers, _, _, _ = load(tiny_sd3_pipeline, 200)
    tokenizers[0].model_max_length = tokenizers[1].model_max_length = 3
    dataset = load_captioned_images(train_data_dir=captioned_images)
    with caplog.at_level(logging.WARNING):
        item = CaptionedImages(dataset, tokenizers, 32, 1)[0]
        assert [len(item[name]) for name in ("input_ids", "input_ids_2", "input_ids_3")] == [3, 3, 200]
        assert not caplog.text
        tokenizers[2].model_max_length = 4
        CaptionedImages(dataset, tokenizers, 32, 1)
        assert "longer than the tokenizer's limit of 4 tokens" in caplog.text


def test_a_pipeline_without_t5_is_built_without_it(folder_without_t5, tmp_path):
    noise_scheduler, tokenizers, text_encoders, vae, transformer = load(folder_without_t5)
    ours = sd3.build_pipeline(transformer, vae, text_encoders, tokenizers, noise_scheduler)
    assert ours.text_encoder_3 is None and ours.tokenizer_3 is None
    assert sd3.has_t5(folder_without_t5, None) is False
    parts = Path(shutil.copytree(folder_without_t5, tmp_path / "parts"))
    (parts / "model_index.json").unlink()
    assert sd3.has_t5(str(parts), None) is False, "a folder of the parts alone"
    # What is kept on disk is of another length then, and its key says so: see acpo_utils.data.latent_cache.
    assert load(folder_without_t5, 12)[2].state_dict()["2.embeddings"].shape == (12, 64)


def test_decode_of_encode_is_the_vaes_round_trip(folder):
    """With its shift factor, on the way in and on the way out."""
    vae = load(folder)[3]
    assert vae.dtype == torch.float32 and vae.config.shift_factor == 0.0609
    vae.encoder.conv_out.bias.data[16:] = -60  # a posterior without spread: its sample is its mean
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
        own = (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
        latents = encode_images({"pixel_values": pixels}, vae, None)
        torch.testing.assert_close(latents, (mean - 0.0609) * 1.5305, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decode_latents(vae, latents), own, atol=1e-5, rtol=1e-5)


def inputs(conditions):
    return (
        torch.randn(2, 16, 16, 24, generator=torch.Generator().manual_seed(3)),
        torch.tensor([0.02, 0.24]),
        conditions,
    )


def test_the_anchor_is_0_at_the_start_and_every_lora_tensor_but_one_layer_has_a_gradient(folder):
    """The last block's add_q_proj asks for the text's next state, which there is none of any more."""
    _, tokenizers, text_encoders, _, transformer = load(folder)
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=sd3.TARGETS.split(",")))
    given = inputs(encoded(tokenizers, text_encoders, PROMPTS))
    base = base_prediction(transformer, *given, predict=sd3.predict)
    assert anchor_loss(sd3.predict(transformer, *given), base).item() == 0.0
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.zero_grad()
        base = base_prediction(transformer, *given, predict=sd3.predict)
        anchor_loss(sd3.predict(transformer, *given), base).backward()
        gradients.append({name: p.grad for name, p in transformer.named_parameters() if p.grad is not None})
    lora = {name for name, _ in transformer.named_parameters() if "lora_" in name}
    moved = {name for name, gradient in gradients[0].items() if gradient.abs().sum() > 0}
    idle = {f"transformer_blocks.1.attn.add_q_proj.lora_{m}.default.weight" for m in "AB"}
    assert moved == lora - idle and len(lora) == 2 * (8 + 7)
    for name in moved:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-6, rtol=1e-4)


def test_a_lora_of_another_alpha_than_rank_is_the_same_in_the_pipeline(folder, tmp_path):
    _, tokenizers, text_encoders, _, transformer = load(folder)
    targets = ["attn.to_q", "attn.add_k_proj", "attn.to_out.0", "ff.net.2"]
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False))
    save_lora(transformer, tmp_path, SD3)
    assert read_lora_config(tmp_path, SD3) == {"rank": 3, "alpha": 7, "target_modules": sorted(targets)}
    given = inputs(encoded(tokenizers, text_encoders, PROMPTS))
    own = SD3.from_pretrained(folder)
    own.load_lora_weights(tmp_path, weight_name=LORA_NAME)
    again = tiny_sd3_transformer()
    again.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=targets))
    load_lora(again, tmp_path, pipeline_class=SD3)
    with torch.no_grad():
        expected = sd3.predict(transformer, *given)
        for other in (own.transformer, again):
            torch.testing.assert_close(sd3.predict(other, *given), expected, atol=1e-6, rtol=0)
        with without_adapter(transformer) as base:
            assert not torch.allclose(sd3.predict(base, *given), expected, atol=1e-3)


def test_the_drift_is_the_anchors_distance_at_sigmas_of_the_whole_range(folder):
    noise_scheduler, tokenizers, text_encoders, vae, transformer = load(folder)
    transformer.add_adapter(LoraConfig(r=3, target_modules=["attn.to_q", "attn.to_v"], init_lora_weights=False))
    pipeline = sd3.build_pipeline(transformer, vae, text_encoders, tokenizers, noise_scheduler)
    conditions = encoded(tokenizers, text_encoders, PROMPTS)
    seen = []

    def predictor(pipeline, prompts, size):
        own = sd3.predictor(pipeline, prompts, size, max_sequence_length=LENGTH)

        def predict(model, latents, sigmas):
            assert torch.equal(own(model, latents, sigmas), sd3.predict(model, latents, sigmas, conditions))
            seen.append(sigmas[0].item())
            return own(model, latents, sigmas)

        return predict

    drift = prediction_drift(pipeline, torch.rand(2, 3, 32, 32), PROMPTS, predictor=predictor)
    assert seen == pytest.approx([(k + 0.5) / 10 for k in range(10) for _ in range(2)])
    assert drift.shape == (2,) and (drift > 0).all()
    with torch.no_grad():
        transformer.set_adapters("default", 0.0)
        assert (prediction_drift(pipeline, torch.rand(2, 3, 32, 32), PROMPTS, predictor=predictor) == 0).all()


def test_a_window_at_small_sigmas_hardly_moves_a_latent(folder):
    """What is noised to sigma and denoised by the exact velocity is the latent: the scale of sigma is 1, not 1000."""
    latents, noise = torch.randn(2, 2, 16, 8, 8)
    noisy = add_noise(latents, noise, torch.tensor([0.25, 0.001]))
    assert (noisy[1] - latents[1]).abs().max() < 0.01
    exact = denoise_late_steps(None, noise - latents, torch.tensor([0.25, 0.001]), noisy)
    torch.testing.assert_close(exact, latents, atol=1e-5, rtol=0)


def test_the_lora_can_act_in_its_window_alone(tiny_sd3_pipeline, tmp_path):
    """`lora_below` goes by the scheduler's timesteps, which are 1000 sigma."""
    transformer = tiny_sd3_transformer()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"], init_lora_weights=False))
    save_lora(transformer, tmp_path, SD3)
    pipeline, acts = quiet(SD3.from_pretrained(tiny_sd3_pipeline)), {}
    pipeline.load_lora_weights(tmp_path, weight_name=LORA_NAME)
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    pipeline.transformer.register_forward_pre_hook(
        lambda model, args, given: acts.update({given["timestep"][0].item(): not layer.disable_adapters}),
        with_kwargs=True,
    )
    callback = lora_below(pipeline, 250)
    pipeline(
        "a fox", num_inference_steps=12, height=32, width=32, max_sequence_length=24, callback_on_step_end=callback
    )
    assert len(acts) == 12 and acts == {timestep: timestep < 250 for timestep in acts} and sum(acts.values()) == 2


# --- What is refused


def test_a_folder_of_another_family_is_refused_by_the_name_of_its_script(folder, tiny_sdxl_pipeline):
    with pytest.raises(ValueError) as error:
        load(tiny_sdxl_pipeline)
    message = str(error.value)
    assert "expected a Stable Diffusion 3 pipeline" in message and "\n" not in message
    assert "it is a StableDiffusionXLPipeline, for train_acpo_lora_sdxl.py." in message
    with pytest.raises(ValueError) as error:
        sdxl.load(str(folder), None, None, torch.float32, "cpu")
    assert "it is a StableDiffusion3Pipeline, for train_acpo_lora_sd3.py." in str(error.value)
    with pytest.raises(ValueError, match="expected a hub id or a folder, found the single file sd3.safetensors"):
        load("sd3.safetensors")


def test_parts_that_do_not_fit_are_refused_before_they_are_loaded(folder):
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    config = folder / "transformer" / "config.json"
    change(config, in_channels=33)
    with pytest.raises(ValueError, match="its transformer takes 33 channels where its VAE has 16"):
        load(folder)
    change(config, in_channels=16, pooled_projection_dim=48)
    with pytest.raises(ValueError, match="pooled embeddings of 48 numbers, and its text encoders give 20 and 20"):
        load(folder)


@pytest.mark.parametrize("part", ["text_encoder_3", "transformer"])
def test_a_missing_tensor_is_named(folder, part):
    (file,) = Path(folder, part).glob("*.safetensors")
    tensors = load_file(file)
    del tensors[next(name for name in tensors if tensors[name].ndim > 1 and "block" in name)]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{part} do not fit its config.json: 1 missing tensors"):
        load(folder)


def test_distilled_models_are_told_by_name_card_or_scheduler(folder, caplog):
    assert sd3.distilled(str(folder), None) is None
    turbo = shutil.copytree(folder, folder.parent / "stable-diffusion-3.5-large-turbo")
    assert sd3.distilled(str(turbo), None) == "'turbo' is in its name"
    (folder / "README.md").write_text("---\nbase_model: stabilityai/stable-diffusion-3.5-large-turbo\n---\n")
    assert sd3.distilled(str(folder), None) == "'turbo' is in its card's base_model"
    FlowMatchLCMScheduler().save_pretrained(folder / "scheduler")
    with caplog.at_level(logging.WARNING):
        assert "FlowMatchLCMScheduler" in sd3.distilled(str(folder), None)
        assert type(load(folder)[0]) is FlowMatchEulerDiscreteScheduler
    assert not caplog.text


def test_the_pipelines_shift_is_that_of_its_tokens(folder):
    """A dynamic shift grows with the picture: sigmas of a larger one are larger."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    middle = [sd3.schedule(scheduler, (1, 16, side, side), 9)[4].item() for side in (32, 64, 128)]
    assert middle == sorted(middle) and middle[0] < middle[2]
    assert partial(sd3.schedule, scheduler, (1, 16, 32, 64))(9)[0] == 1
