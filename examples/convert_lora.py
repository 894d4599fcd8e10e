"""Converts a LoRA of Stable Diffusion's U-Net to the file that ComfyUI, A1111 and Forge load (kohya's), and back.

    python examples/convert_lora.py --lora_path acpo-lora-sd --output_path acpo.safetensors
    python examples/convert_lora.py --lora_path acpo.safetensors --output_path lora.safetensors --to diffusers

The first reads what train_acpo_lora_sd.py has saved. What the second writes is loaded by `load_lora_weights` of diffusers,
as kohya's file is too, and by --lora_path of our scripts. docs/lora-files.md says which layers each program reads.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from acpo_utils.files import atomic_write
from acpo_utils.lora import read_lora, write_lora


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
}


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--lora_path", type=Path, required=True, help="a .safetensors file, or a folder that a training has saved")
    add("--output_path", type=Path, required=True, help="the .safetensors file to write; must not exist")
    add("--to", choices=list(READERS), default="kohya", help="whose form to write; either is read")
    add("--dtype", choices=list(DTYPES), default="fp32", help="fp16 halves the file; what is loaded then is rounded")
    args = parser.parse_args(input_args)
    if args.output_path.suffix != ".safetensors":
        parser.error(f"--output_path: expected a name that ends in .safetensors, found {args.output_path}")
    return args


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
    weights, config = read_lora(args.lora_path)
    for name, weight in weights.items():
        weights[name] = weight.to(DTYPES[args.dtype])
        if weight.isfinite().all() and not weights[name].isfinite().all():
            raise ValueError(f"--dtype fp16: {name} has numbers beyond fp16's largest, 65504: use fp32.")

    args.output_path.parent.mkdir(parents=True, exist_ok=True)
    if args.to == "kohya":
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
        write_lora(weights, lora_config, args.output_path)
    print(
        f"{args.output_path}: {len(weights) // 2} layers, rank {config['rank']}, alpha {config['alpha']:g}, "
        f"{args.dtype}, for {READERS[args.to]}"
    )


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
