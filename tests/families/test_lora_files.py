"""A LoRA's file of each family: its names begin with the part that is trained, and the family's pipeline loads it."""

import json

import pytest
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from acpo_utils.lora import load_lora, read_lora_config, save_lora
from tests.tiny_models import tiny_sdxl_unet, tiny_z_image_transformer


def tiny_sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
    )


def tiny_flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


FAMILIES = {
    "sdxl": (tiny_sdxl_unet, StableDiffusionXLPipeline, "unet"),
    "z_image": (tiny_z_image_transformer, ZImagePipeline, "transformer"),
    "sd3": (tiny_sd3, StableDiffusion3Pipeline, "transformer"),
    "flux": (tiny_flux, FluxPipeline, "transformer"),
}
TARGETS = ["to_k", "to_q", "to_out.0"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_loaded_with_its_alpha_by_us_and_by_the_pipeline(family, tmp_path):
    build, pipeline_class, part = FAMILIES[family]
    model = build()
    model.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS, init_lora_weights=False))
    file = save_lora(model, tmp_path, pipeline_class)
    assert {name.split(".")[0] for name in load_file(file)} == {part}
    assert read_lora_config(file, pipeline_class) == {"rank": 3, "alpha": 7, "target_modules": sorted(TARGETS)}

    ours, theirs = build(), build()
    ours.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS))
    load_lora(ours, file, pipeline_class=pipeline_class)
    weights, *_, metadata = pipeline_class.lora_state_dict(tmp_path, return_lora_metadata=True)
    theirs.load_lora_adapter(weights, metadata=metadata, prefix=part)
    expected = {name: weight for name, weight in model.state_dict().items() if "lora_" in name}
    for other in (ours, theirs):
        (adapter,) = other.peft_config
        assert other.peft_config[adapter].lora_alpha == 7 and other.peft_config[adapter].r == 3
        found = other.state_dict()
        for name, weight in expected.items():
            assert torch.equal(found[name.replace("default", adapter)], weight), name


def test_a_file_of_another_family_is_refused(tmp_path):
    model = tiny_sd3()
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    file = save_lora(model, tmp_path, StableDiffusion3Pipeline)
    with pytest.raises(ValueError, match="expected only tensors named unet.*, found transformer"):
        read_lora_config(file)


def test_the_file_of_the_same_lora_is_the_same_to_the_byte(tmp_path):
    """A set of names has another order in every process: it is sorted."""
    unet, names = tiny_sdxl_unet(), ["to_v", "to_k", "to_out.0", "to_q"]
    unet.add_adapter(LoraConfig(r=2, target_modules=names))
    file = save_lora(unet, tmp_path)
    with safe_open(file, "pt") as saved:
        config = json.loads(saved.metadata()["lora_adapter_metadata"])
    assert config["unet.target_modules"] == sorted(names)
