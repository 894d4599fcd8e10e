"""FLUX.2-klein: what the transformer is told is what its pipeline tells it, and samples are the pipeline's own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig

from acpo_utils.anchor import base_prediction, without_adapter
from acpo_utils.data import token_ids
from acpo_utils.evaluation.denoising_error import prediction_drift
from acpo_utils.families import flux
from acpo_utils.families.latents import decoder_in, encode_images, latent_factor, latents_shape, scale_latents
from acpo_utils.flow_matching import add_noise, check_late_window, denoise_late_steps, rollout_late_latents
from acpo_utils.late_step import crop_latents, decode_latents, unscale_latents
from acpo_utils.lora import LORA_NAME, load_lora, read_lora_config, save_lora
from acpo_utils.losses import anchor_loss
from tests.tiny_models import save_tiny_klein, tiny_klein_transformer, tiny_klein_vae


pytest.importorskip("diffusers", minversion="0.37")
from diffusers import Flux2KleinPipeline  # noqa: E402

from acpo_utils.families import flux2_klein  # noqa: E402


PROMPTS = ["a red wall", "<|endoftext|> a house by the sea"]  # the second has the token that pads
LENGTH = 40


def load(folder, max_sequence_length=LENGTH):
    return flux2_klein.load(str(folder), None, None, torch.float32, "cpu", max_sequence_length)


@pytest.fixture
def folder(tiny_klein_pipeline, tmp_path):
    return Path(shutil.copytree(tiny_klein_pipeline, tmp_path / "pipeline"))


@pytest.fixture(scope="module")
def distilled_folder(tmp_path_factory):
    return save_tiny_klein(tmp_path_factory.mktemp("tiny") / "four-steps", is_distilled=True)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(tokenizers, text_encoders, prompts):
    return flux2_klein.encode_prompts(token_ids(tokenizers, prompts), text_encoders)


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_encodes_them(tiny_klein_pipeline):
    """Padding and all, cut off at the same token."""
    own = Flux2KleinPipeline.from_pretrained(tiny_klein_pipeline)
    for length in (LENGTH, 16):
        _, tokenizers, text_encoders, *_ = load(tiny_klein_pipeline, length)
        conditions = encoded(tokenizers, text_encoders, PROMPTS)
        embeds, _ = own.encode_prompt(PROMPTS, max_sequence_length=length)
        assert embeds.shape == (2, length, 48)
        assert torch.equal(conditions["prompt_embeds"], embeds)
    assert not torch.allclose(*embeds, atol=1e-3), "captions differ"
    kept = flux2_klein.encode_prompts(conditions | {"prompts": PROMPTS}, None)
    assert kept.keys() == {"prompt_embeds"} and kept["prompt_embeds"] is conditions["prompt_embeds"]
    alone = encoded(tokenizers, text_encoders, PROMPTS[:1])["prompt_embeds"]
    torch.testing.assert_close(alone, embeds[:1], atol=1e-5, rtol=1e-5)
    assert len(tokenizers[0]("ab").input_ids) == len(tokenizers[0]("").input_ids) + 2


@pytest.mark.parametrize("guidance_scale, quick", [(1.0, False), (3.0, False), (3.0, True)])
@torch.no_grad()
def test_a_rollout_and_the_steps_after_it_are_the_pipelines_own_latents(
    tiny_klein_pipeline, distilled_folder, guidance_scale, quick
):
    """Of pictures that are not square. Positions, the shift, the sign of v, normalisation and guidance are all in it; of a
    distilled model there is none."""
    folder = distilled_folder if quick else tiny_klein_pipeline
    noise_scheduler, tokenizers, text_encoders, vae, transformer, distilled = load(folder)
    assert distilled == quick
    conditions = encoded(tokenizers, text_encoders, PROMPTS)
    negative = {name: rows.expand(2, -1, -1) for name, rows in encoded(tokenizers, text_encoders, [""]).items()}

    def predict(latents, sigmas):
        positive = flux2_klein.predict(transformer, latents, sigmas, conditions)
        if guidance_scale == 1 or quick:
            return positive
        without = flux2_klein.predict(transformer, latents, sigmas, negative)
        return without + guidance_scale * (positive - without)

    sampled = {"num_inference_steps": 6, "height": 32, "width": 48, "max_sequence_length": LENGTH}
    sampled |= {"guidance_scale": guidance_scale}
    noise = torch.randn(2, 32, 8, 12, generator=torch.Generator().manual_seed(0))
    seen = []

    def keep(pipeline, step, timestep, values):
        seen.append(values["latents"].transpose(1, 2).reshape(noise.shape))
        return values

    own = quiet(Flux2KleinPipeline.from_pretrained(folder))
    expected = own(prompt=PROMPTS, **sampled, latents=noise, output_type="pt", callback_on_step_end=keep).images
    schedule = flux2_klein.schedule(noise_scheduler, noise.shape, 6)
    torch.testing.assert_close(schedule, own.scheduler.sigmas, atol=1e-7, rtol=0)
    stop = int((1000 * schedule >= 800).sum())
    assert 0 < stop < 5
    latents, sigmas = rollout_late_latents(predict, schedule, noise, tmax=800)
    torch.testing.assert_close(latents, seen[stop - 1], atol=1e-5, rtol=1e-5)
    last, sigmas = rollout_late_latents(predict, schedule, noise, tmax=int(1000 * schedule[-3]))
    assert torch.equal(sigmas, schedule[-2].repeat(2))
    last = denoise_late_steps(None, predict(last, sigmas), sigmas, last)
    torch.testing.assert_close(last, seen[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_latents(vae, last), expected, atol=1e-4, rtol=0)
    as_latents = own(prompt=PROMPTS, **sampled, latents=noise, output_type="latent").images
    torch.testing.assert_close(unscale_latents(vae, last), as_latents, atol=1e-5, rtol=1e-5)

    ours = flux2_klein.build_pipeline(transformer, vae, text_encoders, tokenizers, noise_scheduler, is_distilled=quick)
    picture = quiet(ours)(prompt=PROMPTS, **sampled, latents=noise, output_type="pt").images
    torch.testing.assert_close(picture, expected, atol=1e-6, rtol=0)


def test_decode_of_encode_is_the_vaes_round_trip_and_the_latents_are_the_pipelines(tiny_klein_pipeline):
    vae = load(tiny_klein_pipeline)[3]
    vae.quant_conv.weight.data[8:], vae.quant_conv.bias.data[8:] = 0, -60  # without spread a sample is its mean
    own = Flux2KleinPipeline.from_pretrained(tiny_klein_pipeline, vae=vae)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        expected = own._encode_vae_image(pixels, generator=None)
        round_trip = (vae.decode(vae.encode(pixels).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
        latents = encode_images({"pixel_values": pixels}, vae, None)
    assert latents.shape == (2, 32, 8, 12) and latents_shape(vae, 2, 32) == (2, 32, 8, 8)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_latents(vae, latents), round_trip, atol=1e-5, rtol=1e-5)
    noise, sigmas = torch.randn(latents.shape), torch.tensor([0.2, 0.7])
    x0 = denoise_late_steps(None, noise - latents, sigmas, add_noise(latents, noise, sigmas))
    torch.testing.assert_close(x0, latents, atol=1e-5, rtol=1e-5)  # of the exact velocity


def test_a_window_is_of_whole_patches():
    """At every place it can be the VAE's latents are those of the whole."""
    vae = tiny_klein_vae()
    whole = torch.randn(1, 8, 16, 16)
    latents = scale_latents(whole, vae)
    assert latent_factor(vae) == 4
    for seed in range(8):
        window = crop_latents(latents, 12 // latent_factor(vae), torch.Generator().manual_seed(seed))
        crop = unscale_latents(vae, window)
        places = [(2 * i, 2 * j) for i in range(6) for j in range(6)]
        found = [torch.allclose(whole[..., i : i + 6, j : j + 6], crop, atol=1e-5) for i, j in places]
        assert found.count(True) == 1


def test_a_bf16_decoder_keeps_the_statistics_as_they_are():
    vae = tiny_klein_vae().requires_grad_(False)
    latents = torch.randn(1, 32, 8, 8)
    decoder = decoder_in(torch.bfloat16, vae)
    assert decoder.dtype == torch.bfloat16 and decoder.encoder is None and vae.encoder is not None
    assert torch.equal(unscale_latents(decoder, latents), unscale_latents(vae, latents))
    torch.testing.assert_close(decode_latents(decoder, latents), decode_latents(vae, latents), atol=0.03, rtol=0)


def inputs(conditions):
    return (
        torch.randn(2, 32, 8, 12, generator=torch.Generator().manual_seed(3)),
        torch.tensor([0.02, 0.24]),
        conditions,
    )


def test_the_anchor_is_0_at_the_start_and_every_lora_tensor_has_a_gradient(tiny_klein_pipeline):
    """Of the layers that diffusers' script trains: four of the double block, two of each single one."""
    _, tokenizers, text_encoders, _, transformer, _ = load(tiny_klein_pipeline)
    targets = flux2_klein.targets(transformer).split(",")
    assert targets[-2:] == ["single_transformer_blocks.0.attn.to_out", "single_transformer_blocks.1.attn.to_out"]
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    given = inputs(encoded(tokenizers, text_encoders, PROMPTS))
    base = base_prediction(transformer, *given, predict=flux2_klein.predict)
    assert anchor_loss(flux2_klein.predict(transformer, *given), base).item() == 0.0
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    transformer.enable_gradient_checkpointing()
    base = base_prediction(transformer, *given, predict=flux2_klein.predict)
    anchor_loss(flux2_klein.predict(transformer, *given), base).backward()
    for name, parameter in transformer.named_parameters():
        assert ("lora_" in name) == (parameter.grad is not None and parameter.grad.abs().sum().item() > 0), name
    assert sum("lora_" in name for name, _ in transformer.named_parameters()) == 2 * (4 + 2 * 2)


def test_a_lora_of_another_alpha_than_rank_is_the_same_in_the_pipeline(tiny_klein_pipeline, tmp_path):
    _, tokenizers, text_encoders, _, transformer, _ = load(tiny_klein_pipeline)
    targets = ["to_q", "attn.to_qkv_mlp_proj", "single_transformer_blocks.1.attn.to_out", "ff_context.linear_out"]
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False))
    save_lora(transformer, tmp_path, Flux2KleinPipeline)
    found = read_lora_config(tmp_path, Flux2KleinPipeline)
    assert found == {"rank": 3, "alpha": 7, "target_modules": sorted(targets)}
    given = inputs(encoded(tokenizers, text_encoders, PROMPTS))
    own = Flux2KleinPipeline.from_pretrained(tiny_klein_pipeline)
    own.load_lora_weights(tmp_path, weight_name=LORA_NAME)
    again = tiny_klein_transformer()
    again.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=targets))
    load_lora(again, tmp_path, pipeline_class=Flux2KleinPipeline)
    with torch.no_grad():
        expected = flux2_klein.predict(transformer, *given)
        for other in (own.transformer, again):
            torch.testing.assert_close(flux2_klein.predict(other, *given), expected, atol=1e-6, rtol=0)
        with without_adapter(transformer) as base:
            assert not torch.allclose(flux2_klein.predict(base, *given), expected, atol=1e-3)


def test_the_drift_is_measured_on_the_pipelines_latents(tiny_klein_pipeline, monkeypatch):
    noise_scheduler, tokenizers, text_encoders, vae, transformer, _ = load(tiny_klein_pipeline)
    transformer.add_adapter(LoraConfig(r=3, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipeline = flux2_klein.build_pipeline(transformer, vae, text_encoders, tokenizers, noise_scheduler, False)
    images, seen = torch.rand(2, 3, 32, 32), []

    def predictor(*given):
        predict = flux2_klein.predictor(*given, max_sequence_length=LENGTH)
        return lambda model, latents, sigmas: seen.append((latents, sigmas)) or predict(model, latents, sigmas)

    drift = prediction_drift(pipeline, images, PROMPTS, predictor=predictor)
    assert (drift > 0).all()
    noisy, sigmas = seen[0]
    with torch.no_grad():
        clean = pipeline._encode_vae_image(images * 2 - 1, generator=None)
    level = (noisy - (1 - sigmas[0]) * clean) / sigmas[0]  # the noise, if the latents are right
    assert sigmas[0] == pytest.approx(0.05) and level.std().item() == pytest.approx(1, abs=0.05)


def test_a_window_that_klein_does_not_visit_at_1024_pixels_is_refused_with_the_number_of_steps():
    """50 steps end at sigma 0.134 there, four at 0.767."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    schedule = lambda steps: flux2_klein.schedule(scheduler, (1, 128, 64, 64), steps)  # noqa: E731
    assert schedule(50)[-2].item() == pytest.approx(0.134, abs=5e-4)
    assert schedule(4)[-2].item() == pytest.approx(0.767, abs=5e-4)
    check_late_window(schedule, 250, 50)
    with pytest.raises(ValueError, match="end at sigma = 0.134, none below --tmax 100 / 1000: take at least 64 steps"):
        check_late_window(schedule, 100, 50)


def test_distilled_models_are_told_by_their_pipeline_scheduler_name_or_card(folder, distilled_folder, tmp_path):
    told = lambda source: (flux2_klein.is_distilled(source, None), flux2_klein.distilled(source, None))  # noqa: E731
    assert told(folder) == (False, None)
    assert told(distilled_folder) == (True, "is_distilled in its model_index.json")
    turbo = shutil.copytree(folder, tmp_path / "klein-turbo")
    assert told(turbo) == (False, "'turbo' is in its name")
    (folder / "README.md").write_text("---\nbase_model: somebody/klein-Lightning\n---\n# A model\n")
    assert told(folder) == (False, "'lightning' is in its card's base_model")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "FlowMatchLCMScheduler"}))
    (folder / "model_index.json").unlink()
    assert told(folder) == (False, "its scheduler is a FlowMatchLCMScheduler")


def test_a_folder_of_another_family_is_refused_by_the_name_of_its_script(folder, tiny_flux_pipeline):
    with pytest.raises(ValueError) as error:
        load(tiny_flux_pipeline)
    assert "expected a FLUX.2-klein pipeline" in str(error.value) and "\n" not in str(error.value)
    assert "it is a FluxPipeline, for train_acpo_lora_flux.py." in str(error.value)
    with pytest.raises(ValueError, match="it is a Flux2KleinPipeline, for train_acpo_lora_flux2_klein.py."):
        flux.load(str(folder), None, None, torch.float32, "cpu")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "Flux2Pipeline"}))
    with pytest.raises(ValueError, match="it is a Flux2Pipeline, for diffusers' train_dreambooth_lora_flux2.py"):
        load(folder)
    with pytest.raises(ValueError, match="expected a hub id or a folder, found the single file klein.safetensors"):
        load("klein.safetensors")


def test_parts_that_do_not_fit_are_refused_before_they_are_loaded(folder):
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    config = folder / "transformer" / "config.json"
    found = json.loads(config.read_text())
    config.write_text(json.dumps(found | {"in_channels": 64}))
    with pytest.raises(ValueError, match="takes 64 channels where 2 x 2 latents of its VAE have 32"):
        load(folder)
    config.write_text(json.dumps(found | {"joint_attention_dim": 40}))
    with pytest.raises(
        ValueError, match="embeddings of 40 numbers, and layers 9, 18, 27 of its text encoder, which has 28"
    ):
        load(folder)


def test_a_small_decoder_has_the_vaes_latents_or_is_refused(tmp_path):
    pytest.importorskip("diffusers", minversion="0.38")
    vae = tiny_klein_vae()
    small = tiny_klein_vae(seed=5, decoder_block_out_channels=(8, 8))
    small.save_pretrained(tmp_path / "small")
    decoder = flux2_klein.load_small_decoder(str(tmp_path / "small"), vae)
    latents = torch.randn(1, 32, 8, 8)
    expected = small.decode(unscale_latents(vae, latents)).sample / 2 + 0.5
    torch.testing.assert_close(decode_latents(decoder, latents), expected.clamp(0, 1), atol=1e-5, rtol=0)
    assert decoder.encoder is None and not any(p.requires_grad for p in decoder.parameters())
    tiny_klein_vae(latent_channels=4).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="expected latent_channels 8 as the VAE has, found 4"):
        flux2_klein.load_small_decoder(str(tmp_path / "other"), vae)
    with pytest.raises(ValueError, match="expected an AutoencoderKLFlux2 .* such as black-forest-labs/FLUX.2-small-"):
        flux2_klein.load_small_decoder(str(tmp_path / "nothing"), vae)
    assert isinstance(decoder, AutoencoderKLFlux2)
