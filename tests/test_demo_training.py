"""The demo's VAE and text encoder: where the VAE starts, and that the pipeline's text encoder is the CLIP's own."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from open_clip.model import CLIP
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


DEMO = Path(__file__).parents[1] / "examples" / "demo"


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    characters = list(bytes_to_unicode().values())
    tokens = characters + [character + "</w>" for character in characters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=12)


def test_the_text_encoder_is_the_clips_text_tower(tokenizer):
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 12, "vocab_size": len(tokenizer), "width": 16, "heads": 2, "layers": 3}
    clip = CLIP(8, vision, text).eval()
    text_encoder = load_script("train_pipeline").text_tower(clip, tokenizer)
    input_ids = tokenizer(["a fox", "an owl, noto", ""], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        pooled = text_encoder(input_ids.input_ids).pooler_output  # (3, 16)
        torch.testing.assert_close(pooled @ clip.text_projection, clip.encode_text(input_ids.input_ids))


def test_the_vae_starts_with_signals_of_one_size_and_almost_no_noise():
    torch.manual_seed(0)
    vae = load_script("train_vae").new_vae()
    assert all(not block.conv2.weight.any() for block in vae.modules() if isinstance(block, ResnetBlock2D))
    images = torch.randn(2, 3, 64, 64).clamp(-1, 1)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        assert posterior.mean.shape == (2, 4, 16, 16)
        assert 0.2 < posterior.mean.std() < 5
        torch.testing.assert_close(posterior.logvar, torch.full_like(posterior.mean, -6.0))
        assert 0.2 < vae.decode(posterior.mean).sample.std() < 5
