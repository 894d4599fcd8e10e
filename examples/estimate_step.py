"""What a step of the text-to-image scripts takes at a model's real size, in FLOP and memory, with no weights at hand: the
estimate that each of them logs before it begins, for some of its flags.

    python examples/estimate_step.py --family sdxl
    python examples/estimate_step.py --family sdxl --peers   # beside ReFL and SRPO: benchmark_step.py --family sdxl

The networks are on the meta device and have random weights that nothing depends on; only the guide, of CLIP ViT-B/32's size,
runs. It counts what a CPU's kernels keep; a GPU has others, and takes a GiB or two beside the tensors. The peers' are our own
small re-implementations of the published algorithms, for their cost alone. docs/performance.md.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import copy
import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
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
from acpo_utils.families.latents import encode_images, latents_shape
from acpo_utils.families.quantization import read_quantization_config
from acpo_utils.files import atomic_write
from acpo_utils.late_step import decode_latents
from acpo_utils.randomness import batch_randn
from acpo_utils.training.memory_estimate import memory_parts
from acpo_utils.training.step_cost import StepCost


FAMILIES = {
    "sd": {
        "script": "train_acpo_lora_sd.py",
        "module": "stable_diffusion",
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
        "module": "sdxl",
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
        "module": "sd3",
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
        "module": "z_image",
        "resolution": 1024,
        "transformer_class": ZImageTransformer2DModel,
        "transformer": {},
        "conditions": {"prompt_embeds": (1, 512, 2560)},
    },
    "flux": {  # FLUX.1-dev
        "script": "train_acpo_lora_flux.py",
        "module": "flux",
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
        "module": "flux2_klein",
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


class Level(NamedTuple):
    """A point on the way from noise to picture: what the denoiser is told there, and its shares z = signal x0 + noise eps."""

    clock: float
    signal: float
    noise: float


def sampling_levels(family, noise_scheduler, shape, num_steps) -> list[Level]:
    """Those of the family's sampling of latents of `shape`, from noise down to the picture: num_steps + 1."""
    if isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = family.schedule(noise_scheduler, shape, num_steps).tolist()
        return [Level(sigma, 1 - sigma, sigma) for sigma in sigmas]
    scheduler = DDIMScheduler.from_config(noise_scheduler.config)
    scheduler.set_timesteps(num_steps)
    levels = []
    for timestep in scheduler.timesteps.tolist():
        share = scheduler.alphas_cumprod[timestep].item()
        levels.append(Level(timestep, share**0.5, (1 - share) ** 0.5))
    return [*levels, Level(0, 1.0, 0.0)]


def estimate_ends(predict, is_flow, latents, level):
    """(x0, eps), (B, C, h, w) in fp32 each, as `predict` has them at `latents` of `level`: by its velocity eps - x0, or its eps."""
    clock = torch.full((len(latents),), level.clock, device=latents.device)
    pred = predict(latents, clock).float()
    if is_flow:
        return latents - level.noise * pred, latents + level.signal * pred
    return (latents - level.noise * pred) / level.signal, pred


def walk(predict, is_flow, latents, levels):
    """Through `levels` without guidance, one step of the denoiser each: DDIM's, and Euler's where it says velocities."""
    for level, next_level in zip(levels, levels[1:]):
        x0, noise = estimate_ends(predict, is_flow, latents, level)
        latents = next_level.signal * x0 + next_level.noise * noise
    return latents


def peer_inputs(family, batch, denoiser, vae, noise_scheduler, generator, args):
    """What the peers' steps begin with: the denoiser told of the captions, whether it says velocities, noise (B, C, h, w)."""
    conditions = family.encode_prompts(batch, None)
    if hasattr(family, "with_guidance"):  # FLUX.1's is a number, with no pass of its own
        conditions = family.with_guidance(conditions, 3.5)
    embeds = conditions["prompt_embeds"]
    shape = latents_shape(vae, len(embeds), args.resolution)
    noise = batch_randn(shape, generator, embeds[0].device, torch.float32)

    def predict(latents, clock):
        return family.predict(denoiser, latents.to(embeds[0].dtype), clock, conditions=conditions)

    return predict, isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler), noise


def refl_step(
    family, batch, denoiser, vae, decoder, text_encoders, evaluator, noise_scheduler, generator, anchor_weight, args
):
    """ReFL (Xu et al., ImageReward, 2023): 30 to 39 of 40 steps without gradient, here 34; one with; its estimate of x0."""
    predict, is_flow, noise = peer_inputs(family, batch, denoiser, vae, noise_scheduler, generator, args)
    levels = sampling_levels(family, noise_scheduler, noise.shape, 40)
    with torch.no_grad():
        latents = walk(predict, is_flow, noise, levels[:35])
    x0, _ = estimate_ends(predict, is_flow, latents, levels[34])
    scores = evaluator.score(decode_latents(decoder, x0), batch["prompts"])
    return torch.relu(2 - scores).mean(), {}


def srpo_step(
    family,
    batch,
    denoiser,
    vae,
    decoder,
    text_encoders,
    evaluator,
    noise_scheduler,
    generator,
    anchor_weight,
    args,
    from_images,
):
    """SRPO (Shen et al., 2025): a sample of 25 steps without gradient, or a real image, with its own noise mixed in again. From
    there a step towards the image and one away from it, with gradient; the known noise is taken off, the rest scored."""
    predict, is_flow, noise = peer_inputs(family, batch, denoiser, vae, noise_scheduler, generator, args)
    levels = sampling_levels(family, noise_scheduler, noise.shape, 25)
    if from_images:
        x0 = encode_images(batch, vae, generator)
    else:
        with torch.no_grad():
            x0 = walk(predict, is_flow, noise, levels)

    def loss_of_step(start, end):
        latents = start.signal * x0 + start.noise * noise
        latents = walk(predict, is_flow, latents, [start, end])
        recovered = (latents - end.noise * noise) / end.signal
        scores = evaluator.score(decode_latents(decoder, recovered), batch["prompts"])
        return torch.relu(0.7 - scores).mean() / 2

    noisier, cleaner = levels[12], levels[13]
    loss_of_step(noisier, cleaner).backward()  # before the other has a graph, as in the published code
    return loss_of_step(cleaner, noisier), {}


PEERS = {
    "ReFL, 34 steps without gradient, one with": refl_step,
    "SRPO, 25 without, two with": partial(srpo_step, from_images=False),
    "SRPO from real images, two with": partial(srpo_step, from_images=True),
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


def build_step_cost(args, script, guide):
    """What counts the steps of `script`, or of others, on the family's models at their real size."""
    family = FAMILIES[args.family]
    noise_scheduler = DDPMScheduler(clip_sample=False)
    if "transformer" in family:
        noise_scheduler = FlowMatchEulerDiscreteScheduler()
    quantization = None
    if args.bnb_quantization_config_path:
        quantization = read_quantization_config(args.bnb_quantization_config_path)
    images = torch.rand(1, 3, args.resolution, args.resolution)
    guide.score(images, ["a prompt"])  # whose embedding is kept from here on
    return StepCost(
        script.training_step,
        models=build_models(family),
        guide=(guide, images, ["a prompt"]),
        noise_scheduler=noise_scheduler,
        conditions={name: torch.zeros(shape) for name, shape in family["conditions"].items()},
        device=torch.device("cpu"),
        quantization=quantization,
    )


def cost_row(label, step_cost, guide, flags, args):
    """TFLOP for each image, GiB of the whole batch, of the step that `step_cost` counts."""
    tflop = sum(step_cost(flags)[1].values()) / 1e12 / args.train_batch_size
    scorers = {"guide": [guide] if flags.quality_weight else []}
    row = {
        "step": label,
        "TFLOP": tflop,
        "GiB": sum(memory_parts(step_cost, scorers, flags).values()) / 2**30,
    }
    flags.gradient_checkpointing = True
    row["GiB, --gradient_checkpointing"] = sum(memory_parts(step_cost, scorers, flags).values()) / 2**30
    return row


def estimate(args):
    """[{column: number or text}], a row for each of `VARIANTS`, with --peers for each of `PEERS` too."""
    family = FAMILIES[args.family]
    script = load_script(family["script"])
    guide = build_guide()
    step_cost = build_step_cost(args, script, guide)
    rows = []
    for label, flags in tqdm(VARIANTS.items(), desc=f"{args.family} at {args.resolution} px"):
        rows.append(cost_row(label, step_cost, guide, read_flags(script, flags, args), args))
    if args.peers:
        module = getattr(script, family["module"])
        for label, step in PEERS.items():
            peer_cost = copy.copy(step_cost)  # with what has been counted of the models
            peer_cost.training_step = partial(step, module)
            rows.append(cost_row(label, peer_cost, guide, read_flags(script, "", args), args))
    return with_shares(rows)


def with_shares(rows):
    """`rows` with their TFLOP over those of the first one, the LoRA step, and over those of ReFL if it is there."""
    whole = {"of the LoRA step": rows[0]["TFLOP"]}
    whole |= {"of ReFL's step": row["TFLOP"] for row in rows if row["step"].startswith("ReFL")}
    shared = []
    for row in rows:
        first = {name: row[name] for name in ("step", "TFLOP")}
        shares = {name: row["TFLOP"] / tflop for name, tflop in whole.items()}
        shared.append(first | shares | row)
    return shared


def three_digits(number):
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def table(rows):
    """Markdown of `rows`, as it is printed."""
    lines = [[*rows[0]], ["---"] * len(rows[0])]
    for row in rows:
        lines.append([value if isinstance(value, str) else three_digits(value) for value in row.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--family", choices=[*FAMILIES], default="sdxl")
    add("--resolution", type=int, help="default: the family's own")
    add("--train_batch_size", type=int, default=1)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="bf16")
    add("--bnb_quantization_config_path", help="a 4- or 8-bit base, of the families with a transformer")
    add("--peers", action="store_true", help="the steps of ReFL and SRPO too, at the same size")
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
