"""The estimate without weights: its rows, what each flag saves, at tiny sizes."""

import json
import re
from types import SimpleNamespace

import estimate_step as script
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from acpo_utils.evaluators import load_evaluator
from acpo_utils.families import sd3
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


class Known:
    """A family whose denoiser knows the picture `x0` (1, 4, h, w), and keeps what each of its calls was told: the clock, and
    whether there is a gradient."""

    def __init__(self, noise_scheduler, x0):
        self.x0 = x0
        self.is_flow = isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler)
        self.shares = None if self.is_flow else noise_scheduler.alphas_cumprod
        self.schedule = sd3.schedule
        self.clocks, self.with_gradient = [], []

    def encode_prompts(self, batch, text_encoders):
        return {"prompt_embeds": batch["prompt_embeds"]}

    def predict(self, weight, latents, clock, conditions):
        """`weight`, 1, is what is trained."""
        self.clocks.append(clock.item())
        self.with_gradient.append(torch.is_grad_enabled())
        if self.is_flow:
            return weight * (latents - self.x0) / clock.item()  # eps - x0
        share = self.shares[int(clock)]
        return weight * (latents - share.sqrt() * self.x0) / (1 - share).sqrt()  # eps


SCHEDULERS = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
}
CALLS = {  # how many steps sampling has, which of them are taken, and how many at the end have a gradient
    "ReFL, 34 steps without gradient, one with": (40, [*range(35)], 1),
    "SRPO, 25 without, two with": (25, [*range(25), 12, 13], 2),
    "SRPO from real images, two with": (25, [12, 13], 2),
}


@pytest.mark.parametrize("noise_scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("label", CALLS)
def test_a_peer_takes_its_steps_and_scores_the_picture(label, noise_scheduler):
    """A denoiser that knows the picture leads every step there, from wherever it starts: what is scored is that picture."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).requires_grad_(False)
    x0 = torch.randn(1, 4, 8, 8)
    family = Known(noise_scheduler, x0)
    weight = torch.ones((), requires_grad=True)
    scored = []

    def decode(latents, return_dict):
        scored.append(latents)
        return vae.decode(latents, return_dict=False)

    loss, _ = script.PEERS[label](
        family,
        {
            "prompts": ["a prompt"],
            "prompt_embeds": torch.zeros(1, 7, 4),
            "latent_moments": torch.cat([x0 / vae.config.scaling_factor, torch.full_like(x0, -60.0)], dim=1),
        },
        weight,
        vae,
        SimpleNamespace(config=vae.config, dtype=vae.dtype, decode=decode),
        None,
        SimpleNamespace(score=lambda images, prompts: images.mean((1, 2, 3))),
        noise_scheduler,
        torch.Generator().manual_seed(1),
        0.0,
        SimpleNamespace(resolution=8),
    )
    loss.backward()
    num_steps, taken, gradients = CALLS[label]
    sampler = (FlowMatchEulerDiscreteScheduler if family.is_flow else DDIMScheduler).from_config(
        noise_scheduler.config
    )
    sampler.set_timesteps(num_steps)
    clocks = (sampler.sigmas if family.is_flow else sampler.timesteps).tolist()
    assert family.clocks == [clocks[step] for step in taken]
    assert family.with_gradient == [False] * (len(taken) - gradients) + [True] * gradients
    assert weight.grad.abs() > 0
    for latents in scored:
        torch.testing.assert_close(latents * vae.config.scaling_factor, x0, rtol=0, atol=2e-3)
    assert len(scored) == gradients


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_peers_walk_is_the_samplers_own(name):
    """Step by step the latents of diffusers' scheduler, for predictions that depend on them."""
    noise_scheduler = SCHEDULERS[name]
    is_flow = name == "flow"
    sampler = (FlowMatchEulerDiscreteScheduler if is_flow else DDIMScheduler).from_config(noise_scheduler.config)
    sampler.set_timesteps(12)
    torch.manual_seed(0)
    start = torch.randn(2, 4, 8, 8)
    expected = start
    for timestep in sampler.timesteps:
        expected = sampler.step(torch.sin(expected), timestep, expected).prev_sample
    levels = script.sampling_levels(sd3, noise_scheduler, start.shape, 12)
    found = script.walk(lambda latents, clock: torch.sin(latents), is_flow, start, levels)
    assert len(levels) == 13
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_peers_cost_the_passes_they_take(tiny_guide, monkeypatch, tmp_path):
    """Beside ACPO's late step, which is one pass without gradient and one that is decoded and scored."""
    changed = script.FAMILIES["sd3"]["transformer"] | NARROW["sd3"]
    monkeypatch.setitem(script.FAMILIES["sd3"], "transformer", changed)
    conditions = {"prompt_embeds": (1, 20, 16), "pooled_prompt_embeds": (1, 24)}
    monkeypatch.setitem(script.FAMILIES["sd3"], "conditions", conditions)
    monkeypatch.setattr(script, "build_guide", lambda: load_evaluator(f"ipce:{tiny_guide}").requires_grad_(False))
    monkeypatch.setattr(script, "VARIANTS", dict(list(script.VARIANTS.items())[:3:2]))
    flags = ["--family", "sd3", "--resolution", "64", "--peers", "--output_file", str(tmp_path / "cost.json")]
    script.main(script.parse_args(flags))
    rows = json.loads((tmp_path / "cost.json").read_text())
    assert [row["step"] for row in rows] == [*script.VARIANTS, *script.PEERS]
    lora, late, refl, srpo, offline = (row["TFLOP"] for row in rows)
    forward = (2 * late - offline) / 2
    assert 0 < forward < lora
    assert refl == pytest.approx(late + 33 * forward)
    assert srpo == pytest.approx(offline + 25 * forward)
    assert [row["of ReFL's step"] for row in rows] == [pytest.approx(row["TFLOP"] / refl) for row in rows]
    # At its peak SRPO has one graph, as ReFL has: the first is gone before the second is made.
    memory = [row["GiB"] for row in rows[1:]]
    assert memory == [pytest.approx(memory[0], rel=0.01)] * 4


def test_numbers_are_read_at_a_glance():
    rows = [{"step": "a", "TFLOP": 14.54}, {"step": "b", "TFLOP": 2723.3}]
    assert script.table(rows).splitlines()[2:] == ["| a | 14.5 |", "| b | 2,723 |"]
