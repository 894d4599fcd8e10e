import os
import sys

from tests import REPOSITORY


# The demo's scripts import each other, as scripts of one folder do.
sys.path.append(str(REPOSITORY / "examples" / "demo"))

# Before torch is imported: one thread is several times faster than two on models this small, and nothing is fetched.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage


COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (240, 220, 60)}


def tiny_unet(seed: int = 0, **overrides):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**(config | overrides))


def tiny_vae(seed: int = 1):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=32,
    )


def tiny_taesd(seed: int = 6, **overrides):
    """An AutoencoderTiny of `tiny_vae`'s latents: twice as many pixels as latents along a side."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(seed)
    config = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(**(config | {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)} | overrides))


def tiny_scheduler(**overrides):
    from diffusers import DDPMScheduler

    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDPMScheduler(**(config | {"clip_sample": False, "steps_offset": 1} | overrides))


def tiny_tokenizer():
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    tokens = characters + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> str:
    """A Stable Diffusion folder of real classes at a tiny size, with random weights."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tiny_tokenizer()
    torch.manual_seed(2)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=32,
        )
    )
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=tiny_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_guide(tmp_path_factory) -> str:
    """An IPCE folder around a tiny open_clip model with random weights."""
    from acpo_utils.evaluators import IPCE

    torch.manual_seed(3)
    guide = IPCE(
        {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
            "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        }
    )
    folder = tmp_path_factory.mktemp("tiny") / "guide"
    guide.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def captioned_images(tmp_path_factory) -> str:
    """A folder with train.parquet: twelve real-coloured 40 x 36 pictures with captions."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        pixels = np.clip(np.array(colour) + rng.normal(0, 20, (36, 40, 3)), 0, 255).astype(np.uint8)
        rows.append({"image": PILImage.fromarray(pixels), "text": f"a {name} wall {i}"})
    folder = tmp_path_factory.mktemp("tiny") / "images"
    folder.mkdir()
    Dataset.from_list(rows, features=Features({"image": Image(), "text": Value("string")})).to_parquet(
        folder / "train.parquet"
    )
    return str(folder)


@pytest.fixture(autouse=True)
def uncounted_guide(monkeypatch):
    """tests.guides counts its calls: every test counts from 0."""
    monkeypatch.setattr("tests.guides.calls", 0)
