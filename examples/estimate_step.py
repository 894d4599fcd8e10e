"""What a step of the text-to-image scripts takes at a model's real size, in FLOP and memory, with no weights at hand: the
estimate that each of them logs before it begins, for some of its flags.

    python examples/estimate_step.py --family sdxl

The networks are on the meta device and have random weights that nothing depends on; only the guide, of CLIP ViT-B/32's size,
runs. It counts what a CPU's kernels keep; a GPU has others, and takes a GiB or two beside the tensors. docs/performance.md.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import importlib.util
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from peft import LoraConfig
from tqdm.auto import tqdm

from acpo_utils.evaluators import IPCE
from acpo_utils.families.quantization import read_quantization_config
from acpo_utils.files import atomic_write
from acpo_utils.training.memory_estimate import memory_parts
from acpo_utils.training.step_cost import StepCost


FAMILIES = {
    "sd": {
        "script": "train_acpo_lora_sd.py",
        "resolution": 512,
        "unet": {
            "sample_size": 64,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        "conditions": {"prompt_embeds": (1, 77, 768)},
    },
    "sdxl": {
        "script": "train_acpo_lora_sdxl.py",
        "resolution": 1024,
        "unet": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        },
        "conditions": {
            "prompt_embeds": (1, 77, 2048),
            "pooled_prompt_embeds": (1, 1280),
            "time_ids": (1, 6),
        },
    },
    "sd3": {  # 3.5, medium
        "script": "train_acpo_lora_sd3.py",
        "resolution": 1024,
        "transformer_class": SD3Transformer2DModel,
        "transformer": {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        "conditions": {
            "prompt_embeds": (1, 77 + 256, 4096),
            "pooled_prompt_embeds": (1, 2048),
        },
    },
    "z-image": {  # a caption of 512 tokens, which few are
        "script": "train_acpo_lora_z_image.py",
        "resolution": 1024,
        "transformer_class": ZImageTransformer2DModel,
        "transformer": {},
        "conditions": {"prompt_embeds": (1, 512, 2560)},
    },
    "flux": {  # FLUX.1-dev
        "script": "train_acpo_lora_flux.py",
        "resolution": 1024,
        "transformer_class": FluxTransformer2DModel,
        "transformer": {"guidance_embeds": True},
        "conditions": {
            "prompt_embeds": (1, 512, 4096),
            "pooled_prompt_embeds": (1, 768),
        },
    },
    "flux2-klein": {  # 4B
        "script": "train_acpo_lora_flux2_klein.py",
        "resolution": 1024,
        "transformer_class": Flux2Transformer2DModel,
        "transformer": {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        "vae_class": AutoencoderKLFlux2,
        "latent_channels": 32,
        "target_modules": [
            "to_k",
            "to_q",
            "to_v",
            "to_out.0",
            "to_qkv_mlp_proj",
            *[f"single_transformer_blocks.{n}.attn.to_out" for n in range(20)],
        ],
        "conditions": {
            "prompt_embeds": (1, 512, 7680),
        },
    },
}
TARGETS = [
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "add_k_proj",
    "add_q_proj",
    "add_v_proj",
    "to_add_out",  # of the transformers
]
# Flags for each row, beside --cache_latents: the first is a plain LoRA step.
VARIANTS = {
    "LoRA": "--quality_weight 0 --anchor_weight 0",
    "ACPO, a second draw of t for L_diff": "",
    "ACPO, --diffusion_timesteps late": "--diffusion_timesteps late",
    "as the last, --decode_dtype bf16": "--diffusion_timesteps late --decode_dtype bf16",
    "as the last but one, --decode crop, half the side": "--diffusion_timesteps late --decode crop",
    "the same, --decode tiny": "--diffusion_timesteps late --decode tiny --tiny_vae_name_or_path x",
}


def load_script(name):
    path = Path(__file__).resolve().with_name(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def build_models(family):
    """On the meta device, frozen but for the LoRA; the text encoders are off the device, as after --cache_latents."""
    flow_matching = "transformer" in family
    with torch.device("meta"):
        if flow_matching:
            unet = family["transformer_class"](**family["transformer"]).requires_grad_(False)
        else:
            unet = UNet2DConditionModel(**family["unet"]).requires_grad_(False)
        vae = family.get("vae_class", AutoencoderKL)(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=family.get("latent_channels", 16 if flow_matching else 4),
        )
        lora_config = LoraConfig(
            r=4,
            lora_alpha=4,
            target_modules=family.get("target_modules", TARGETS),
        )
        unet.add_adapter(lora_config)
    vae.requires_grad_(False)
    for model in (unet, vae):  # as the scripts have them
        if model is vae or not flow_matching:
            model.to(memory_format=torch.channels_last)
    return unet, vae, vae, torch.nn.ModuleList()


def build_guide():
    return IPCE(
        {
            "embed_dim": 512,
            "vision_cfg": {
                "image_size": 224,
                "layers": 12,
                "width": 768,
                "patch_size": 32,
            },
            "text_cfg": {
                "context_length": 77,
                "vocab_size": 49408,
                "width": 512,
                "heads": 8,
                "layers": 12,
            },
        }
    ).requires_grad_(False)


def read_flags(script, flags, args):
    """The script's arguments: `flags`, and what it asks for besides, of which nothing is read."""
    words = f"--pretrained_model_name_or_path x --train_data_dir x --evaluator x --cache_latents --center_crop {flags}"
    words += f" --resolution {args.resolution} --train_batch_size {args.train_batch_size}"
    words += f" --mixed_precision {args.mixed_precision}"
    if "--decode crop" in flags:
        words += f" --decode_size {args.resolution // 2}"
    return script.parse_args(words.split())


def estimate(args):
    """[{column: number or text}], a row for each of `VARIANTS`: TFLOP for each image, GiB of the whole batch."""
    family = FAMILIES[args.family]
    script = load_script(family["script"])
    noise_scheduler = DDPMScheduler(clip_sample=False)
    if "transformer" in family:
        noise_scheduler = FlowMatchEulerDiscreteScheduler()
    quantization = None
    if args.bnb_quantization_config_path:
        quantization = read_quantization_config(args.bnb_quantization_config_path)
    guide = build_guide()
    images = torch.rand(1, 3, args.resolution, args.resolution)
    guide.score(images, ["a prompt"])  # whose embedding is kept from here on
    step_cost = StepCost(
        script.training_step,
        models=build_models(family),
        guide=(guide, images, ["a prompt"]),
        noise_scheduler=noise_scheduler,
        conditions={name: torch.zeros(shape) for name, shape in family["conditions"].items()},
        device=torch.device("cpu"),
        quantization=quantization,
    )
    rows = []
    for label, flags in tqdm(VARIANTS.items(), desc=f"{args.family} at {args.resolution} px"):
        flags = read_flags(script, flags, args)
        scorers = {"guide": [guide] if flags.quality_weight else []}
        tflop = sum(step_cost(flags)[1].values()) / 1e12 / args.train_batch_size
        row = {"step": label, "TFLOP": tflop}
        row["of the LoRA step"] = tflop / (rows[0]["TFLOP"] if rows else tflop)
        row["GiB"] = sum(memory_parts(step_cost, scorers, flags).values()) / 2**30
        flags.gradient_checkpointing = True
        row["GiB, --gradient_checkpointing"] = sum(memory_parts(step_cost, scorers, flags).values()) / 2**30
        rows.append(row)
    return rows


def table(rows):
    """Markdown of `rows`, as it is printed."""
    lines = [[*rows[0]], ["---"] * len(rows[0])]
    for row in rows:
        lines.append([format(value, ".3g" if isinstance(value, float) else "") for value in row.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--family", choices=[*FAMILIES], default="sdxl")
    add("--resolution", type=int, help="default: the family's own")
    add("--train_batch_size", type=int, default=1)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="bf16")
    add("--bnb_quantization_config_path", help="a 4- or 8-bit base, of the families with a transformer")
    add("--output_file", type=Path, help="the numbers as json")
    args = parser.parse_args(input_args)
    args.resolution = args.resolution or FAMILIES[args.family]["resolution"]
    if args.resolution % 64 or args.resolution < 64 or args.train_batch_size < 1:
        parser.error(
            f"expected --resolution as a multiple of 64 and --train_batch_size of at least 1, found {args.resolution} and "
            f"{args.train_batch_size}"
        )
    if args.bnb_quantization_config_path:
        if "transformer" not in FAMILIES[args.family]:
            parser.error(f"--bnb_quantization_config_path: --family {args.family} has no transformer")
        try:
            read_quantization_config(args.bnb_quantization_config_path)
        except ValueError as error:
            parser.error(str(error))
    return args


def main(args):
    torch.manual_seed(0)
    rows = estimate(args)
    print(f"\n{table(rows)}")
    if args.output_file:
        with atomic_write(args.output_file) as temporary:
            temporary.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main(parse_args())
