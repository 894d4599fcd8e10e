"""The benchmark counts what it says: rows of the U-Net, and FLOP that fall as its flags promise."""

import benchmark_step as script
import pytest
import torch

from tests.launching import EXAMPLES, refused


# The parts of "half", narrower and with fewer blocks: U-Net and decoder still cost more than all the rest.
SMALL = {
    "resolution": 128,
    "unet": {
        "sample_size": 16,
        "cross_attention_dim": 32,
        "block_out_channels": (64, 128),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
    },
    "vae": {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1},
    "tiny": {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4},
    "text": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1},
    "guide": script.VIT_B_32
    | {
        "vision_cfg": {"image_size": 32, "layers": 4, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(script.SIZES, "small", SMALL)


def test_rows_and_flop_of_each_step():
    world = script.World("small", "meta", torch.float32, 2)
    counted = {
        label: script.count(world, step)
        for label, step in script.steps(script.load_script()).items()
        if label not in SLOW
    }
    assert [rows for rows, _ in counted.values()] == [1, 3, 3, 2, 2, 2, 35]
    lora, shipped, cached, late, crop, tiny, refl = (tflop for _, tflop in counted.values())
    assert shipped > cached > late > max(crop, tiny) and min(crop, tiny) > 0 and refl > 2 * late
    unet, vae = world.unet, world.vae
    assert not any(p.requires_grad for p in vae.parameters()) and any(p.requires_grad for p in unet.parameters())


SLOW = ("DRaFT+, K = 1", "AlignProp, K = 1", "DDPO")  # a hundred rows and more


def test_the_steps_run_and_train_the_lora():
    torch.manual_seed(0)
    world = script.World("small", "cpu", torch.float32, 1)
    every = script.steps(script.load_script())
    for label in ("LoRA, as diffusers ships it", "ACPO, as the last, --decode tiny"):
        every[label](world)
        assert any(p.grad is not None and p.grad.any() for p in world.parameters), label
        world.unet.zero_grad()
    lora = {"LoRA, as diffusers ships it": every["LoRA, as diffusers ships it"]}
    assert script.cpu_seconds(world, lora, 1)["LoRA, as diffusers ships it"] > 0
    assert "| step | s |" in script.table([{"step": "a", "s": 0.5}])


def test_a_family_is_estimated_beside_its_peers(tmp_path, monkeypatch):
    seen = []
    estimate_step = script.load_script(EXAMPLES / "estimate_step.py")
    monkeypatch.setattr(estimate_step, "main", seen.append)
    monkeypatch.setattr(script, "load_script", lambda path: estimate_step)
    script.main(script.parse_args(["--family", "flux", "--output_file", str(tmp_path / "cost.json")]))
    (args,) = seen
    assert args.family == "flux" and args.peers and args.output_file == tmp_path / "cost.json"


@pytest.mark.slow
def test_the_whole_script_is_timed():
    assert script.script_seconds(script.World("half", "cpu", torch.float32, 1), script.load_script(), 1) > 0


def test_mistakes_are_one_line():
    benchmark = EXAMPLES / "benchmark_step.py"
    assert "--repetitions: expected at least 1, found 0" in refused(benchmark, "--repetitions", 0)
    assert script.parse_args([]).measure == ["flop", "cpu"]
    assert "not allowed with argument" in refused(benchmark, "--family", "sdxl", "--measure", "cpu")
    assert "argument --family: invalid choice: 'sdxs'" in refused(benchmark, "--family", "sdxs")
    if not torch.cuda.is_available():
        for name in ("cuda", "cuda_steps"):
            assert f"--measure {name}: expected a CUDA device, found none" in refused(benchmark, "--measure", name)
