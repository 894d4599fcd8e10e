"""The estimate without weights: its rows, what each flag saves, at tiny sizes."""

import json
import re

import estimate_step as script
import pytest

from acpo_utils.evaluators import load_evaluator
from acpo_utils.families.quantization import quantized_layers
from tests.launching import EXAMPLES, refused


def test_rows_fall_as_the_flags_promise(tiny_guide, monkeypatch, tmp_path):
    """With a narrow U-Net, told narrow embeddings; the VAE is of its real size."""
    sdxl = script.FAMILIES["sdxl"]
    narrow = {
        "block_out_channels": (32, 32, 32),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "transformer_layers_per_block": (1, 1, 1),
        "layers_per_block": 1,
        "projection_class_embeddings_input_dim": 16 + 6 * 256,
    }
    conditions = {"prompt_embeds": (1, 77, 16), "pooled_prompt_embeds": (1, 16), "time_ids": (1, 6)}
    monkeypatch.setitem(sdxl, "unet", sdxl["unet"] | narrow)
    monkeypatch.setitem(sdxl, "conditions", conditions)
    monkeypatch.setattr(script, "build_guide", lambda: load_evaluator(f"ipce:{tiny_guide}").requires_grad_(False))
    flags = ["--family", "sdxl", "--resolution", "256", "--output_file", str(tmp_path / "cost.json")]
    script.main(script.parse_args(flags))
    rows = json.loads((tmp_path / "cost.json").read_text())
    lora, shipped, late, bf16, crop, tiny = rows
    assert [row["step"] for row in rows] == list(script.VARIANTS)
    assert lora["of the LoRA step"] == 1
    assert shipped["TFLOP"] > late["TFLOP"] == bf16["TFLOP"] > crop["TFLOP"] > tiny["TFLOP"] > lora["TFLOP"]
    assert late["GiB"] > max(bf16["GiB"], crop["GiB"], tiny["GiB"])
    assert all(row["GiB"] > row["GiB, --gradient_checkpointing"] > 0 for row in rows)


NARROW = {
    "z-image": {
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
    },
    "sd3": {
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 24,
        "dual_attention_layers": (),
    },
    "flux": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 24,
        "axes_dims_rope": (4, 4, 8),
    },
    "flux2-klein": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 4, 4, 4),
    },
}
# How many kinds of layers have a LoRA: the last block of SD3 has no to_add_out; in Z-Image captions and pictures share theirs;
# of FLUX.2-klein they are the six that diffusers' script trains.
KINDS = {"sd3": 7, "flux": 8, "z-image": 4, "flux2-klein": 6}


@pytest.mark.parametrize("family", NARROW)
def test_a_transformer_is_counted_too(family, tiny_guide, monkeypatch):
    """Of one narrow layer; its LoRA is on all projections of attention."""
    if family == "flux2-klein":
        pytest.importorskip("diffusers", minversion="0.37")
    changed = script.FAMILIES[family]["transformer"] | NARROW[family]
    monkeypatch.setitem(script.FAMILIES[family], "transformer", changed)
    conditions = {"prompt_embeds": (1, 20, 16), "pooled_prompt_embeds": (1, 24)}
    monkeypatch.setitem(script.FAMILIES[family], "conditions", conditions)
    monkeypatch.setattr(script, "build_guide", lambda: load_evaluator(f"ipce:{tiny_guide}").requires_grad_(False))
    monkeypatch.setattr(script, "VARIANTS", dict(list(script.VARIANTS.items())[:3]))
    lora, shipped, late = script.estimate(script.parse_args(["--family", family, "--resolution", "128"]))
    assert shipped["TFLOP"] > late["TFLOP"] > lora["TFLOP"] > 0
    assert all(row["GiB"] >= row["GiB, --gradient_checkpointing"] > 0 for row in (shipped, late))
    transformer = script.build_models(script.FAMILIES[family])[0]
    layers = {name.rpartition(".lora_A")[0] for name, _ in transformer.named_parameters() if ".lora_A." in name}
    projections = {re.split(r"att(?:entio)?n\.", layer)[1] for layer in layers}
    assert len(projections) == KINDS[family]


def test_a_4_bit_base_takes_less_by_its_weights(tiny_guide, monkeypatch):
    """And more by the largest layer, which is whole while it computes."""
    flux = script.FAMILIES["flux"]
    monkeypatch.setitem(flux, "transformer", flux["transformer"] | NARROW["flux"] | {"attention_head_dim": 128})
    monkeypatch.setitem(flux["transformer"], "axes_dims_rope", (32, 32, 64))
    monkeypatch.setitem(flux, "conditions", {"prompt_embeds": (1, 20, 16), "pooled_prompt_embeds": (1, 24)})
    monkeypatch.setattr(script, "build_guide", lambda: load_evaluator(f"ipce:{tiny_guide}").requires_grad_(False))
    monkeypatch.setattr(script, "VARIANTS", dict(list(script.VARIANTS.items())[:1]))
    flags = ["--family", "flux", "--resolution", "64"]
    path = EXAMPLES / "accelerate_configs" / "bnb_nf4.json"
    (whole,) = script.estimate(script.parse_args(flags))
    (quantized,) = script.estimate(script.parse_args([*flags, "--bnb_quantization_config_path", str(path)]))
    transformer = script.build_models(flux)[0]
    weights = [m.weight.numel() for m in quantized_layers(transformer, {"load_in_4bit": True})]
    saved = (whole["GiB, --gradient_checkpointing"] - quantized["GiB, --gradient_checkpointing"]) * 2**30
    expected = sum(weights) * (2 - 0.5 - 1 / 64) - 2 * max(weights)
    assert saved == pytest.approx(expected, rel=0.02)
    assert quantized["TFLOP"] == whole["TFLOP"]


def test_the_familys_own_size_and_mistakes(tmp_path):
    path = ("--bnb_quantization_config_path", tmp_path / "none.json")
    assert "--family sdxl has no transformer" in refused(EXAMPLES / "estimate_step.py", *path)
    assert "cannot be read" in refused(EXAMPLES / "estimate_step.py", "--family", "flux", *path)
    assert script.parse_args([]).resolution == 1024 and script.parse_args(["--family", "sd"]).resolution == 512
    assert "--resolution as a multiple of 64" in refused(EXAMPLES / "estimate_step.py", "--resolution", 100)
