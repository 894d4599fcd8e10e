"""A tiny pipeline as the one file that Civitai and the first releases of Stable Diffusion have: latent-diffusion's names."""

import re
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file


UNET = {
    r"time_embedding\.linear_1": "time_embed.0",
    r"time_embedding\.linear_2": "time_embed.2",
    r"^conv_in": "input_blocks.0.0",
    r"^conv_norm_out": "out.0",
    r"^conv_out": "out.2",
    r"mid_block\.resnets\.0": "middle_block.0",
    r"mid_block\.attentions\.0": "middle_block.1",
    r"mid_block\.resnets\.1": "middle_block.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE = {
    r"conv_norm_out": "norm_out",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"group_norm": "norm",
    r"to_q\b": "q",
    r"to_k\b": "k",
    r"to_v\b": "v",
    r"to_out\.0": "proj_out",
    r"conv_shortcut": "nin_shortcut",
    r"downsamplers\.0": "downsample",
    r"upsamplers\.0": "upsample",
}


def save_single_file(pipeline: StableDiffusionPipeline, path: str | Path) -> None:
    """All of the pipeline's weights in one .safetensors of latent-diffusion's form."""
    tensors = {}
    for name, tensor in pipeline.unet.state_dict().items():
        tensors["model.diffusion_model." + _unet_name(name, pipeline.unet.config)] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        if re.search(r"attentions\..*to_.*weight", name):
            tensor = tensor[:, :, None, None]  # a convolution of 1 x 1 there
        tensors["first_stage_model." + _vae_name(name, pipeline.vae.config)] = tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors[f"cond_stage_model.transformer.{name}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _unet_name(name: str, config) -> str:
    blocks = config.layers_per_block + 1
    with_attention = {
        side: ["CrossAttn" in block for block in config[f"{side}_block_types"]] for side in ("down", "up")
    }

    def numbered(match: re.Match) -> str:
        side, level, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        if side == "down" and kind == "downsamplers":
            return f"input_blocks.{blocks * (level + 1)}.0.op"
        if side == "down":
            return f"input_blocks.{blocks * level + layer + 1}.{int(kind == 'attentions')}"
        if kind == "upsamplers":
            return f"output_blocks.{blocks * (level + 1) - 1}.{1 + with_attention['up'][level]}.conv"
        return f"output_blocks.{blocks * level + layer}.{int(kind == 'attentions')}"

    resnet = "resnets" in name
    name = re.sub(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(?:\.conv(?=\.\w+$))?", numbered, name)
    for pattern, ldm in UNET.items():
        name = re.sub(pattern, ldm, name)
    if resnet:
        for part, ldm in UNET_RESNET.items():
            name = re.sub(rf"\b{part}\b", ldm, name)
    return name


def _vae_name(name: str, config) -> str:
    last = len(config.up_block_types) - 1
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", name)
    for pattern, ldm in VAE.items():
        name = re.sub(pattern, ldm, name)
    return name
