"""Converts a LoRA that our scripts have saved to the file that ComfyUI, A1111 and Forge load, and back.

    python examples/convert_lora.py --lora_path acpo-lora-sd --output_path acpo.safetensors
    python examples/convert_lora.py --lora_path acpo.safetensors --output_path lora.safetensors --to diffusers

Of a U-Net (Stable Diffusion 1.x, 2.x, XL) that is kohya's file, and the second command leads back. Of a transformer (Stable
Diffusion 3, FLUX.1, Z-Image, FLUX.2-klein) the names stay diffusers', which ComfyUI reads; alpha, which it does not find in
our file, goes into the weights. `load_lora_weights` of diffusers and --lora_path of our scripts load all of these.
docs/lora-files.md says which layers each program reads.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from acpo_utils.files import atomic_write
from acpo_utils.lora import LORA_NAME, read_lora, write_lora


DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
}
MATRICES = {
    "A.weight": "lora_down.weight",
    "B.weight": "lora_up.weight",
}
READERS = {
    "kohya": "ComfyUI, A1111 and Forge",
    "diffusers": "diffusers",
}
# What kohya's trainer says of its base model, by the width of the text that the cross-attention reads.
BASE_MODELS = {
    768: {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
    },
    1024: {"ss_v2": "True"},  # sd_v2 or, if it predicts the velocity, sd_v2_v: the LoRA does not tell
    2048: {
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0",
    },
}


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--lora_path", type=Path, required=True, help="a .safetensors file, or a folder that a training has saved")
    add("--output_path", type=Path, required=True, help="the .safetensors file to write; must not exist")
    add(
        "--to",
        choices=list(READERS),
        help="whose form to write; either is read. Default: kohya's of a U-Net; of a transformer there is diffusers' alone",
    )
    add("--dtype", choices=list(DTYPES), default="fp32", help="fp16 halves the file; what is loaded then is rounded")
    args = parser.parse_args(input_args)
    if args.output_path.suffix != ".safetensors":
        parser.error(f"--output_path: expected a name that ends in .safetensors, found {args.output_path}")
    return args


def is_of_transformer(path: Path) -> bool:
    """Whether the names in a LoRA file or folder begin with `transformer.`. False for no file, too: `read_lora` says why."""
    try:
        with safe_open(path / LORA_NAME if path.is_dir() else path, framework="pt") as file:
            return any(name.startswith("transformer.") for name in file.keys())
    except (OSError, SafetensorError):
        return False


def alpha_in_weights(weights: dict[str, torch.Tensor], config: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """The same LoRA with alpha = rank: `lora_B` times alpha / rank.

    Programs other than diffusers do not know peft's metadata: without a tensor `alpha` they take alpha to be the rank. With
    one of each layer in the file, the loaders of diffusers differ: SD3's and FLUX.2's leave it out, Z-Image's then expects
    other names. A factor in the weights is read alike by all.
    """
    factor = config["alpha"] / config["rank"]
    scaled = {}
    for name, weight in weights.items():
        scaled[name] = factor * weight if name.endswith(".lora_B.weight") else weight
    return scaled, config | {"alpha": config["rank"]}


def to_kohya(weights: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """`mid_block.resnets.0.conv1.lora_A.weight` becomes `lora_unet_mid_block_resnets_0_conv1.lora_down.weight`.

    The matrices stay as they are: of a convolution, lora_down (rank, channels, 3, 3) has its kernel and lora_up
    (channels, rank, 1, 1) is 1 x 1 in both. Each layer gets its `alpha`: what is loaded is alpha / rank times up @ down.
    """
    converted = {}
    for name, weight in weights.items():
        module, _, matrix = name.rpartition(".lora_")
        layer = "lora_unet_" + module.replace(".", "_")
        converted[f"{layer}.{MATRICES[matrix]}"] = weight
        converted[f"{layer}.alpha"] = torch.tensor(float(alpha))  # fp32: whatever the rest is, this is a factor of it
    return converted


def kohya_metadata(weights: dict[str, torch.Tensor], config: dict) -> dict[str, str]:
    """What interfaces show of a file and sort it by."""
    rank = str(config["rank"])
    alpha = str(float(config["alpha"]))
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
    }
    if any(weight.shape[2:] == (3, 3) for weight in weights.values()):
        metadata["ss_network_args"] = json.dumps({"conv_dim": rank, "conv_alpha": alpha})
    for name, weight in weights.items():
        if name.endswith(("attn2.to_k.lora_A.weight", "attn2.to_v.lora_A.weight")):
            return metadata | BASE_MODELS.get(weight.shape[1], {})
    return metadata


def main(args):
    if args.output_path.exists():
        raise ValueError(f"--output_path {args.output_path} exists: remove it or name another.")
    of_transformer = is_of_transformer(args.lora_path)
    if of_transformer and args.to == "kohya":
        raise ValueError(
            f"--to kohya: expected a U-Net's LoRA, {args.lora_path} is of a transformer, whose q, k and v are one layer in "
            "kohya's names: leave --to out, ComfyUI reads diffusers' names."
        )
    # Of the families' loaders that of Stable Diffusion 3 takes the names of any transformer as they are.
    pipeline_class = StableDiffusion3Pipeline if of_transformer else None
    weights, config = read_lora(args.lora_path, pipeline_class)
    if of_transformer:
        weights, config = alpha_in_weights(weights, config)
    to = args.to or ("diffusers" if of_transformer else "kohya")
    for name, weight in weights.items():
        weights[name] = weight.to(DTYPES[args.dtype])
        if weight.isfinite().all() and not weights[name].isfinite().all():
            raise ValueError(f"--dtype fp16: {name} has numbers beyond fp16's largest, 65504: use fp32.")

    args.output_path.parent.mkdir(parents=True, exist_ok=True)
    if to == "kohya":
        tensors = to_kohya(weights, config["alpha"])
        metadata = kohya_metadata(weights, config)
        with atomic_write(args.output_path) as temporary:
            save_file(tensors, temporary, metadata)
    else:
        lora_config = LoraConfig(
            r=config["rank"],
            lora_alpha=config["alpha"],
            target_modules=config["target_modules"],
        )
        write_lora(weights, lora_config, args.output_path, pipeline_class)
    print(
        f"{args.output_path}: {len(weights) // 2} layers, rank {config['rank']}, alpha {config['alpha']:g}, "
        f"{args.dtype}, for {'ComfyUI and diffusers' if of_transformer else READERS[to]}"
    )


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
