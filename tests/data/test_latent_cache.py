"""Latents and prompt embeddings computed once: what the encoders would have said, the same rows, flips and captions."""

import json

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from safetensors.torch import load_file

from acpo_utils.data import CachedLatents, CaptionedImages, collate, latent_cache, load_captioned_images
from acpo_utils.families.latents import encode_images
from acpo_utils.families.stable_diffusion import encode_prompts
from acpo_utils.families.stable_diffusion import load as load_stable_diffusion
from tests import REPOSITORY
from tests.launching import refused, run_script


SCRIPT = REPOSITORY / "examples" / "train_acpo_lora_sd.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven oblong pictures with one to three captions."""
    pixels = torch.randint(256, (7, 40, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    rows = [
        {"image": PILImage.fromarray(p), "text": [f"wall {i} {k}" for k in range(1 + i % 3)]}
        for i, p in enumerate(pixels)
    ]
    folder = tmp_path_factory.mktemp("images")
    features = Features({"image": Image(), "text": List(Value("string"))})
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def models(tiny_pipeline):
    _, tokenizer, text_encoder, vae, _ = load_stable_diffusion(tiny_pipeline, None, None, torch.float32, "cpu")
    return tokenizer, text_encoder, vae


def cache(dataset, models, folder, **options):
    tokenizer, text_encoder, vae = models
    options = {"num_samples": 40, "seed": 3, "random_flip": True} | options
    cached = CachedLatents(dataset, tokenizer, 32, folder, **options)
    cached.build(vae, text_encoder, Accelerator(cpu=True), encode_prompts)
    return cached


def test_items_are_those_of_the_images_themselves(folder, models, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "ROWS_PER_FILE", 3)
    tokenizer, text_encoder, vae = models
    dataset = load_captioned_images(train_data_dir=str(folder))
    images = CaptionedImages(dataset, tokenizer, 32, num_samples=40, seed=3, center_crop=True, random_flip=True)
    cached = cache(dataset, models, tmp_path)
    assert len(list(tmp_path.glob("latents-*.safetensors"))) == 3 and len(cached) == 40
    batch, kept = (collate([items[n] for n in range(40)]) for items in (images, cached))
    assert kept["prompts"] == batch["prompts"] and len(set(kept["prompts"])) > 10
    assert set(kept) == {"latent_moments", "prompt_embeds", "prompts"}
    latents, same = (encode_images(b, vae, torch.Generator().manual_seed(0)) for b in (batch, kept))
    torch.testing.assert_close(same, latents, atol=1e-5, rtol=0)
    embeds, same = (encode_prompts(b, text_encoder)["prompt_embeds"] for b in (batch, kept))
    torch.testing.assert_close(same, embeds, atol=1e-5, rtol=0)
    unflipped = cache(dataset, models, tmp_path / "unflipped", random_flip=False)
    assert not torch.allclose(
        collate([unflipped[n] for n in range(40)])["latent_moments"], kept["latent_moments"], atol=0.1
    )


def test_a_cache_is_used_again_and_one_of_other_models_data_or_settings_is_refused(
    folder, models, tmp_path, tiny_pipeline
):
    dataset = load_captioned_images(train_data_dir=str(folder))
    cache(dataset, models, tmp_path)
    (file,) = tmp_path.glob("latents-*.safetensors")
    written = file.stat().st_mtime_ns
    cache(dataset, models, tmp_path, seed=4)  # another order of the same items
    assert file.stat().st_mtime_ns == written
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])  # damaged: computed again
    cache(dataset, models, tmp_path)
    assert file.read_bytes() == whole

    for changes, expected in (
        ({"random_flip": False}, "flips True there, now False"),
        ({"dtype": torch.bfloat16}, "dtype float32 there, now bfloat16"),
    ):
        with pytest.raises(ValueError, match=f"holds latents of another run .{expected}"):
            cache(dataset, models, tmp_path, **changes)
    with pytest.raises(ValueError, match="data .* there, now"):
        cache(dataset.select(range(5)), models, tmp_path)
    tokenizer, text_encoder, vae = models
    other = load_stable_diffusion(tiny_pipeline, None, None, torch.float32, "cpu")[3]
    with torch.no_grad():
        other.encoder.conv_out.bias.add_(0.01)
    with pytest.raises(ValueError, match="vae [0-9a-f]{16} there, now"):
        cache(dataset, (tokenizer, text_encoder, other), tmp_path)


def test_a_training_on_kept_latents_is_the_training_on_images(sd_flags, lora_of, tmp_path):
    """Not bit for bit: images are encoded one by one for the cache, and a batch rounds by its size."""
    options = {"center_crop": True, "random_flip": True, "checkpointing_steps": 2}
    run_script(SCRIPT, *sd_flags("images", **options))
    run_script(SCRIPT, *sd_flags("cached", cache_latents=True, **options))
    images, cached = lora_of("images"), lora_of("cached")
    assert max(weight.abs().max() for name, weight in images.items() if "lora_B" in name) > 1e-3
    assert all(torch.allclose(images[name], cached[name], atol=1e-4) for name in images)
    assert json.loads((tmp_path / "cached" / "latents" / "cache.json").read_text())["flips"] is True
    kept = load_file(tmp_path / "cached" / "latents" / "latents-00000.safetensors")
    assert kept["moments 0"].shape == (2, 8, 16, 16) and kept["prompt_embeds 0"].shape == (1, 16, 32)


@pytest.mark.parametrize("late_start", ["data", "rollout"])
def test_the_encoders_are_not_called_once_the_latents_are_kept(sd_flags, late_start, monkeypatch):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    calls = []
    encode, forward = AutoencoderKL.encode, CLIPTextModel.forward
    monkeypatch.setattr(
        AutoencoderKL, "encode", lambda self, x, *a, **k: calls.append(len(x)) or encode(self, x, *a, **k)
    )
    monkeypatch.setattr(
        CLIPTextModel, "forward", lambda self, ids=None, *a, **k: calls.append("text") or forward(self, ids, *a, **k)
    )
    options = {"center_crop": True, "cache_latents": True, "late_start": late_start, "num_inference_steps": 3}
    run_script(SCRIPT, *sd_flags(**options))
    assert calls.count(1) == 12 and calls.count("text") == 13, "twelve images and captions, and the empty prompt"


def test_what_cannot_be_kept_is_refused(sd_flags):
    out = refused(SCRIPT, *sd_flags(cache_latents=True))
    assert "--cache_latents needs images and --center_crop" in out
