"""A pipeline with random weights, at its real size or a tiny one, for measuring where there is no hub: what a step takes does
not depend on what the weights are. What is drawn with them is noise.

    python examples/random_pipeline.py --family sdxl --device cuda --output_dir random-sdxl

OUTPUT_DIR then has pipeline/, tiny_vae/, guide/ (an IPCE of CLIP ViT-B/32's size) and images/ (smooth random pictures with
captions): what the family's training script asks for. Stable Diffusion 3.5 is the medium one without T5, of which only the
embeddings reach the transformer: they are zeros, as many as there would be.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import importlib.util
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torchvision.utils import save_image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from acpo_utils import check_min_version
from acpo_utils.evaluators import IPCE


check_min_version("0.2.0")
HERE = Path(__file__).resolve().parent
RESOLUTIONS = {"sd": 512, "sdxl": 1024, "sd3": 1024}
TINY_RESOLUTION = 64
NUM_TOKENS = 77
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
# The tiny size: the same classes, narrow and shallow.
TINY_VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
TINY_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 32,
}
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TINY_NETS = {
    "sd": TINY_UNET | {"cross_attention_dim": 32},
    "sdxl": TINY_UNET
    | {
        "cross_attention_dim": 64,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
    "sd3": {
        "sample_size": 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
}
TINY_GUIDE = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 32,
        "patch_size": 16,
        "head_width": 16,
    },
    "text_cfg": {
        "context_length": NUM_TOKENS,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


def load_estimate_step():
    """The sizes of the real ones are those of the estimate."""
    spec = importlib.util.spec_from_file_location("estimate_step", HERE / "estimate_step.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def build_tokenizer() -> CLIPTokenizer:
    """The demo's, with as many tokens to a caption as CLIP's."""
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "demo" / "pipeline", subfolder="tokenizer")
    tokenizer.model_max_length = NUM_TOKENS
    return tokenizer


def build_text_encoder(model_class, config: dict, tokenizer) -> torch.nn.Module:
    text_config = CLIPTextConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=NUM_TOKENS,
        **config,
    )
    return model_class(text_config)


def build_vae(family: str, tiny: bool) -> AutoencoderKL:
    scales = {"sd": 0.18215, "sdxl": 0.13025, "sd3": 1.5305}
    flow_matching = family == "sd3"
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16 if flow_matching else 4,
        scaling_factor=scales[family],
        shift_factor=0.0609 if flow_matching else None,
        use_quant_conv=not flow_matching,
        use_post_quant_conv=not flow_matching,
        **(TINY_VAE if tiny else VAE),
    )


def build_tiny_vae(family: str, tiny: bool) -> AutoencoderTiny:
    widths = (8 if tiny else 64,) * 4
    return AutoencoderTiny(
        latent_channels=16 if family == "sd3" else 4,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
    )


def build_pipeline(family: str, tiny: bool):
    tokenizer = build_tokenizer()
    config = TINY_NETS[family]
    if not tiny:
        known = load_estimate_step().FAMILIES[family]
        config = known.get("unet") or known["transformer"]
    first, second = (TINY_CLIP, TINY_CLIP) if tiny else (CLIP_L, CLIP_G)
    vae = build_vae(family, tiny)
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
    )
    if family == "sd":
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=build_text_encoder(CLIPTextModel, first, tokenizer),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**config),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    second_encoder = build_text_encoder(CLIPTextModelWithProjection, second, tokenizer)
    if family == "sdxl":
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=build_text_encoder(CLIPTextModel, first, tokenizer),
            text_encoder_2=second_encoder,
            tokenizer=tokenizer,
            tokenizer_2=build_tokenizer(),
            unet=UNet2DConditionModel(**config),
            scheduler=scheduler,
            add_watermarker=False,
        )
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=build_text_encoder(CLIPTextModelWithProjection, first, tokenizer),
        text_encoder_2=second_encoder,
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(),
        tokenizer_3=None,
        transformer=SD3Transformer2DModel(**config),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def save_images(folder: Path, resolution: int, number: int) -> None:
    """Smooth random pictures, each with a caption of its own, as an image folder."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = []
    for n in range(number):
        coarse = torch.rand(1, 3, 8, 8)
        image = F.interpolate(coarse, size=(resolution, resolution), mode="bicubic").clamp(0, 1)
        save_image(image, folder / f"{n}.png")
        captions.append({"file_name": f"{n}.png", "text": f"a picture of {n} clouds"})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in captions))


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--family", choices=[*RESOLUTIONS], default="sd")
    add("--size", choices=["real", "tiny"], default="real")
    add("--device", default="cpu", help="where the weights are drawn: billions of them take a CPU minutes")
    add("--num_images", type=int, default=8)
    add("--seed", type=int, default=0)
    add("--output_dir", type=Path, required=True)
    args = parser.parse_args(input_args)
    if args.num_images < 1:
        parser.error(f"--num_images: expected at least 1, found {args.num_images}")
    return args


def main(args):
    torch.manual_seed(args.seed)
    tiny = args.size == "tiny"
    with torch.device(args.device):
        pipeline = build_pipeline(args.family, tiny)
        tiny_vae = build_tiny_vae(args.family, tiny)
    guide = IPCE(TINY_GUIDE) if tiny else load_estimate_step().build_guide()
    for part in pipeline.components.values():
        if isinstance(
            part, torch.nn.Module
        ):  # diffusers' own `to` warns of modules that want fp32, of which there are none
            torch.nn.Module.to(part, torch.bfloat16)  # half of the disk; the scripts read them as they need them
    pipeline.save_pretrained(args.output_dir / "pipeline")
    tiny_vae.save_pretrained(args.output_dir / "tiny_vae")
    guide.save_pretrained(args.output_dir / "guide")
    save_images(args.output_dir / "images", TINY_RESOLUTION if tiny else RESOLUTIONS[args.family], args.num_images)


if __name__ == "__main__":
    main(parse_args())
