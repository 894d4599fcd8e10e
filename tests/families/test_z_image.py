"""Z-Image: what the transformer is told is what its pipeline tells it, and samples are the pipeline's own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from peft import LoraConfig
from transformers import Qwen3ForCausalLM, Qwen3Model

from acpo_utils.anchor import base_prediction, without_adapter
from acpo_utils.data import CachedLatents, CaptionedImages, collate, load_captioned_images, to_device, token_ids
from acpo_utils.evaluation.denoising_error import prediction_drift
from acpo_utils.families import flux, z_image
from acpo_utils.families.latents import encode_images
from acpo_utils.families.loading import distilled_by_card
from acpo_utils.flow_matching import add_noise, denoise_late_steps, rollout_late_latents
from acpo_utils.late_step import decode_latents
from acpo_utils.lora import LORA_NAME, load_lora, read_lora_config, save_lora
from acpo_utils.losses import anchor_loss
from tests.tiny_models import tiny_z_image_transformer


# In the chat's words 14 and 50 tokens: the transformer fills them up to 32 and 64.
PROMPTS = ["fox", "a house by the sea, late in the evening"]
LENGTH = 60


def load(folder, max_sequence_length=LENGTH):
    return z_image.load(str(folder), None, None, torch.float32, "cpu", max_sequence_length)


@pytest.fixture(scope="module")
def parts(tiny_z_image_pipeline):
    """Of tests that leave them as they are."""
    return load(tiny_z_image_pipeline)


@pytest.fixture
def folder(tiny_z_image_pipeline, tmp_path):
    return Path(shutil.copytree(tiny_z_image_pipeline, tmp_path / "pipeline"))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def encoded(parts, prompts):
    return z_image.encode_prompts(token_ids(parts[1], prompts), parts[2])


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_encodes_them(parts, tiny_z_image_pipeline):
    given = list(PROMPTS)
    conditions = encoded(parts, given)
    assert given == PROMPTS
    own = ZImagePipeline.from_pretrained(tiny_z_image_pipeline)
    expected, negative = own.encode_prompt(list(PROMPTS), max_sequence_length=LENGTH)
    for found, embeds, length in zip(conditions["prompt_embeds"], expected, (14, 50)):
        assert found.shape == (length, 16) and torch.equal(found, embeds)
    (empty, again) = z_image.without_prompt(conditions, encoded(parts, [""]))["prompt_embeds"]
    assert empty is again and torch.allclose(empty, negative[0], atol=1e-6)
    kept = z_image.encode_prompts(conditions | {"prompts": PROMPTS}, None)
    assert all(one is other for one, other in zip(kept["prompt_embeds"], conditions["prompt_embeds"], strict=True))


@torch.no_grad()
def test_a_caption_that_is_cut_or_names_the_token_that_pads_is_the_pipelines_too(parts, tiny_z_image_pipeline):
    own = ZImagePipeline.from_pretrained(tiny_z_image_pipeline)
    prompts = ["so long " * 20, "what <|endoftext|> says"]
    expected = own.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=LENGTH)[0]
    found = encoded(parts, prompts)["prompt_embeds"]
    assert [len(embeds) for embeds in found] == [LENGTH, len(parts[1][0](prompts[1]).input_ids)]
    assert all(torch.equal(*both) for both in zip(found, expected))


@torch.no_grad()
def test_captions_of_unlike_length_in_a_batch_are_told_as_each_alone(parts):
    conditions, transformer = encoded(parts, PROMPTS), parts[4]
    latents, sigmas, _ = inputs(conditions)
    together = z_image.predict(transformer, latents, sigmas, conditions)
    for row, prompt in enumerate(PROMPTS):
        one = slice(row, row + 1)
        alone = z_image.predict(transformer, latents[one], sigmas[one], encoded(parts, [prompt]))
        torch.testing.assert_close(alone, together[one], atol=2e-6, rtol=0)
        other = z_image.predict(transformer, latents[one], sigmas[one], encoded(parts, [PROMPTS[1 - row]]))
        assert not torch.allclose(other, together[one], atol=1e-3), "captions differ"


GUIDANCE = {
    "none": {"guidance_scale": 0.0},
    "guided": {"guidance_scale": 5.0},
    "normalised": {"guidance_scale": 5.0, "cfg_normalization": 1.0},
    "normalised to less, and truncated": {"guidance_scale": 3.0, "cfg_normalization": 0.8, "cfg_truncation": 0.25},
}


@pytest.mark.parametrize("case", GUIDANCE)
@torch.no_grad()
def test_a_rollout_and_the_steps_after_it_are_the_pipelines_own_latents(parts, tiny_z_image_pipeline, case):
    """Of pictures that are not square. The clock, the shift, both signs of v and guidance are all in it."""
    noise_scheduler, tokenizers, text_encoders, vae, transformer = parts
    conditions, guidance = encoded(parts, PROMPTS), GUIDANCE[case]
    negative = z_image.without_prompt(conditions, encoded(parts, [""]))

    def predict(latents, sigmas):
        positive = z_image.predict(transformer, latents, sigmas, conditions)
        if not guidance["guidance_scale"]:
            return positive
        other = z_image.predict(transformer, latents, sigmas, negative)
        return z_image.guided(positive, other, sigmas, **guidance)

    sampled = guidance | {"num_inference_steps": 7, "height": 32, "width": 48, "max_sequence_length": LENGTH}
    noise = torch.randn(2, 16, 16, 24, generator=torch.Generator().manual_seed(0))
    own, seen = quiet(ZImagePipeline.from_pretrained(tiny_z_image_pipeline)), []

    def keep(pipeline, step, timestep, values):
        seen.append(values["latents"])
        return values

    expected = own(list(PROMPTS), **sampled, latents=noise, output_type="pt", callback_on_step_end=keep).images
    schedule = z_image.schedule(noise_scheduler, noise.shape, 7)
    torch.testing.assert_close(schedule, own.scheduler.sigmas[: len(schedule)], atol=1e-6, rtol=0)
    assert schedule[-1] == 0 < schedule[-2]
    stop = int((1000 * schedule >= 800).sum())
    assert 0 < stop < 6
    latents, sigmas = rollout_late_latents(predict, schedule, noise, tmax=800)
    torch.testing.assert_close(latents, seen[stop - 1], atol=1e-5, rtol=1e-5)
    assert torch.equal(sigmas, schedule[stop].repeat(2))
    last, sigmas = rollout_late_latents(predict, schedule, noise, tmax=int(1000 * schedule[-3]))
    assert torch.equal(sigmas, schedule[-2].repeat(2))
    last = denoise_late_steps(None, predict(last, sigmas), sigmas, last)
    torch.testing.assert_close(last, seen[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_latents(vae, last), expected, atol=1e-4, rtol=0)

    ours = quiet(z_image.build_pipeline(transformer, vae, text_encoders, tokenizers, noise_scheduler))
    picture = ours(list(PROMPTS), **sampled, latents=noise, output_type="pt").images
    torch.testing.assert_close(picture, expected, atol=1e-6, rtol=0)
    assert len(noise_scheduler.sigmas) == 1000, "the training's own is not sampled with"


def test_guidance_is_normalised_and_truncated_sample_by_sample():
    generator = torch.Generator().manual_seed(1)
    pred, negative = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64).requires_grad_().unbind()
    sigmas = torch.tensor([0.1, 0.3, 0.9])
    plain = z_image.guided(pred, negative, sigmas, 4.0)
    torch.testing.assert_close(plain, (5 * pred - 4 * negative).float(), atol=1e-5, rtol=0)
    half = z_image.guided(pred, negative, sigmas, 4.0, cfg_normalization=0.5, cfg_truncation=0.7)
    assert torch.equal(half[0], pred[0].float()), "at sigma 0.1, after 1 - 0.7"
    for row in (1, 2):
        assert half[row].norm().item() == pytest.approx(0.5 * pred[row].norm().item(), rel=1e-5)
        assert torch.cosine_similarity(half[row].flatten(), plain[row].flatten(), dim=0).item() == pytest.approx(1)
    wide = z_image.guided(pred, negative, sigmas, 4.0, cfg_normalization=100.0)
    assert torch.equal(wide, plain), "what is short enough stays"
    assert torch.autograd.grad(half.sum(), pred)[0].isfinite().all()


def test_what_is_noised_and_denoised_by_the_exact_velocity_is_the_latent():
    latents, noise = torch.randn(2, 2, 16, 8, 8)
    sigmas = torch.tensor([0.25, 0.9])
    noisy = add_noise(latents, noise, sigmas)

    def transformer(pictures, clock, captions, return_dict):
        """x0 - eps, picture by picture, on a clock that runs from noise to picture."""
        torch.testing.assert_close(clock, 1 - sigmas)
        assert torch.equal(torch.cat(pictures, dim=1).movedim(1, 0), noisy)
        return [(latents - noise).unsqueeze(2).unbind()]

    velocity = z_image.predict(transformer, noisy, sigmas, {"prompt_embeds": []})
    torch.testing.assert_close(denoise_late_steps(None, velocity, sigmas, noisy), latents, atol=1e-5, rtol=0)


def test_decode_of_encode_is_the_vaes_round_trip(folder):
    vae = load(folder)[3]
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


def test_the_anchor_is_0_at_the_start_and_every_lora_tensor_has_a_gradient(folder):
    given, transformer = inputs(encoded(load(folder), PROMPTS)), load(folder)[4]
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=z_image.TARGETS.split(",")))
    base = base_prediction(transformer, *given, predict=z_image.predict)
    assert anchor_loss(z_image.predict(transformer, *given), base).item() == 0.0
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.zero_grad()
        base = base_prediction(transformer, *given, predict=z_image.predict)
        anchor_loss(z_image.predict(transformer, *given), base).backward()
        gradients.append({name: p.grad for name, p in transformer.named_parameters() if p.grad is not None})
    lora = {name for name, _ in transformer.named_parameters() if "lora_" in name}
    assert {name for name, gradient in gradients[0].items() if gradient.abs().sum() > 0} == lora
    assert len(lora) == 2 * 4 * (2 + 1 + 1), "both refiners as well"
    for name in lora:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-6, rtol=1e-4)


def test_a_lora_of_another_alpha_than_rank_is_the_same_in_the_pipeline(tiny_z_image_pipeline, tmp_path):
    parts = load(tiny_z_image_pipeline)
    transformer, targets = parts[4], ["to_q", "to_out.0", "feed_forward.w2"]
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False))
    save_lora(transformer, tmp_path, ZImagePipeline)
    assert read_lora_config(tmp_path, ZImagePipeline) == {"rank": 3, "alpha": 7, "target_modules": sorted(targets)}
    given = inputs(encoded(parts, PROMPTS))
    own = ZImagePipeline.from_pretrained(tiny_z_image_pipeline)
    own.load_lora_weights(tmp_path, weight_name=LORA_NAME)
    again = tiny_z_image_transformer()
    again.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=targets))
    load_lora(again, tmp_path, pipeline_class=ZImagePipeline)
    with torch.no_grad():
        expected = z_image.predict(transformer, *given)
        for other in (own.transformer, again):
            torch.testing.assert_close(z_image.predict(other, *given), expected, atol=1e-6, rtol=0)
        with without_adapter(transformer) as base:
            assert not torch.allclose(z_image.predict(base, *given), expected, atol=1e-3)


def test_the_drift_is_the_anchors_distance_for_the_pipelines_own_captions(folder):
    noise_scheduler, tokenizers, text_encoders, vae, transformer = parts = load(folder)
    transformer.add_adapter(LoraConfig(r=3, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipeline = z_image.build_pipeline(transformer, vae, text_encoders, tokenizers, noise_scheduler)
    conditions, prompts = encoded(parts, PROMPTS), list(PROMPTS)

    def predictor(pipeline, prompts, size):
        own = z_image.predictor(pipeline, prompts, size, max_sequence_length=LENGTH)

        def predict(model, latents, sigmas):
            assert torch.equal(own(model, latents, sigmas), z_image.predict(model, latents, sigmas, conditions))
            return own(model, latents, sigmas)

        return predict

    drift = prediction_drift(pipeline, torch.rand(2, 3, 32, 32), prompts, predictor=predictor)
    assert drift.shape == (2,) and (drift > 0).all()
    predictor(pipeline, prompts, (32, 32))
    assert prompts == PROMPTS, "the pipeline writes its chat into the list that it is given"


def test_what_is_kept_of_captions_is_of_their_own_length(parts, captioned_images, tmp_path):
    """Several captions a picture, of unlike lengths: kept, batched and moved without padding."""
    from accelerate import Accelerator

    dataset = load_captioned_images(train_data_dir=captioned_images)
    several = [
        [f"wall {row}", "a wall of no colour at all, seen from afar"][: 1 + row % 2] for row in range(len(dataset))
    ]
    dataset = dataset.remove_columns("text").add_column("text", several)
    options = {"num_samples": 40, "seed": 3, "random_flip": True}
    images = CaptionedImages(dataset, parts[1], 32, center_crop=True, **options)
    cached = CachedLatents(dataset, parts[1], 32, tmp_path, **options)
    cached.build(parts[3], parts[2], Accelerator(cpu=True), z_image.encode_prompts)
    batch, kept = (collate([items[n] for n in range(40)]) for items in (images, cached))
    assert kept["prompts"] == batch["prompts"] and set(kept) == {"latent_moments", "prompt_embeds", "prompts"}
    embeds, same = (z_image.encode_prompts(b, parts[2])["prompt_embeds"] for b in (batch, kept))
    assert {len(one) for one in same} == {len(parts[1][0](prompt).input_ids) for prompt in kept["prompts"]}
    for one, other in zip(embeds, same, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=0)
    moved = to_device(kept, "meta")
    assert {one.device.type for one in moved["prompt_embeds"]} == {"meta"} and moved["prompts"] == kept["prompts"]
    alike = collate([cached[0], cached[0]])["prompt_embeds"]
    assert isinstance(alike, torch.Tensor) and z_image.encode_prompts({"prompt_embeds": alike}, None)


def test_captions_too_long_for_the_chat_are_counted(tiny_z_image_pipeline, captioned_images, caplog):
    """The chat's own eleven tokens are part of the limit."""
    dataset = load_captioned_images(train_data_dir=captioned_images)
    longest = max(map(len, dataset["text"]))
    CaptionedImages(dataset, load(tiny_z_image_pipeline, longest + 11)[1], 32, 1)
    assert not caplog.text
    CaptionedImages(dataset, load(tiny_z_image_pipeline, longest + 10)[1], 32, 1)
    assert f"longer than the tokenizer's limit of {longest + 10} tokens" in caplog.text


def test_a_text_encoder_that_was_saved_with_a_head_is_the_same(folder, parts):
    """As Qwen3-4B itself is, and the hub's Z-Image."""
    body = Qwen3Model.from_pretrained(folder / "text_encoder")
    whole = Qwen3ForCausalLM(body.config)
    whole.model.load_state_dict(body.state_dict())
    whole.save_pretrained(folder / "text_encoder")
    for one, other in zip(encoded(load(folder), PROMPTS)["prompt_embeds"], encoded(parts, PROMPTS)["prompt_embeds"]):
        assert torch.equal(one, other)


# --- What is refused, and what is warned of


def test_distilled_models_are_told_by_name_card_or_schedule(folder):
    assert z_image.distilled(str(folder), None) is None
    assert z_image.distilled("Tongyi-MAI/Z-Image-Turbo", None) == "'turbo' is in its name"
    assert distilled_by_card("Tongyi-MAI/Z-Image") is None, "of the hub, which is not there"
    card = folder / "README.md"
    for header, found in {
        "base_model: Tongyi-MAI/Z-Image-Turbo": "'turbo' is in its card's base_model",
        "base_model:\n- Tongyi-MAI/Z-Image\ntags:\n- art\n- DMD2": "'dmd' is in its card's tags",
        "base_model: Tongyi-MAI/Z-Image\ntags: [art]": None,
        "base_model: [": None,
    }.items():
        card.write_text(f"---\n{header}\n---\nNo Turbo.\n")
        assert z_image.distilled(str(folder), None) == found
    card.unlink()
    scheduler = folder / "scheduler" / "scheduler_config.json"
    change(scheduler, shift=3.0)
    assert z_image.distilled(str(folder), None) == "its scheduler's shift is 3, Z-Image-Turbo's"
    change(scheduler, _class_name="FlowMatchLCMScheduler")
    assert z_image.distilled(str(folder), None) == "its scheduler is a FlowMatchLCMScheduler"


def test_a_folder_of_another_family_is_refused_by_the_name_of_its_script(folder, tiny_flux_pipeline):
    with pytest.raises(ValueError) as error:
        load(tiny_flux_pipeline)
    assert "expected a Z-Image pipeline" in str(error.value) and "\n" not in str(error.value)
    assert "it is a FluxPipeline, for train_acpo_lora_flux.py." in str(error.value)
    with pytest.raises(ValueError, match="it is a ZImagePipeline, for train_acpo_lora_z_image.py."):
        flux.load(str(folder), None, None, torch.float32, "cpu")
    with pytest.raises(ValueError, match="expected a hub id or a folder, found the single file z.safetensors"):
        load("z.safetensors")


def test_parts_that_do_not_fit_are_refused_before_they_are_loaded(folder):
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    config = folder / "transformer" / "config.json"
    change(config, in_channels=33)
    with pytest.raises(ValueError, match="its transformer takes 33 channels where its VAE has 16"):
        load(folder)
    change(config, in_channels=16, cap_feat_dim=40)
    with pytest.raises(ValueError, match="embeddings of 40 numbers, and its text encoder gives 16"):
        load(folder)
    change(config, siglip_feat_dim=8)
    with pytest.raises(ValueError, match="its transformer looks at pictures as well"):
        load(folder)
