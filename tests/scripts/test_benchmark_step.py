"""The benchmark counts what it says: rows of the U-Net, and FLOP that fall as its flags promise."""

import benchmark_step as script
import pytest
import torch

from tests.launching import EXAMPLES, refused


def test_rows_and_flop_of_each_step():
    world = script.World("half", "meta", torch.float32, 2)
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
    world = script.World("half", "cpu", torch.float32, 1)
    every = script.steps(script.load_script())
    for label in ("LoRA, as diffusers ships it", "ACPO, as the last, --decode tiny"):
        every[label](world)
        assert any(p.grad is not None and p.grad.any() for p in world.parameters), label
        world.unet.zero_grad()
    lora = {"LoRA, as diffusers ships it": every["LoRA, as diffusers ships it"]}
    assert script.cpu_seconds(world, lora, 1)["LoRA, as diffusers ships it"] > 0
    assert "| step | s |" in script.table([{"step": "a", "s": 0.5}])


@pytest.mark.slow
def test_the_whole_script_is_timed():
    assert script.script_seconds(script.World("half", "cpu", torch.float32, 1), script.load_script(), 1) > 0


def test_mistakes_are_one_line():
    benchmark = EXAMPLES / "benchmark_step.py"
    assert "--repetitions: expected at least 1, found 0" in refused(benchmark, "--repetitions", 0)
    assert script.parse_args([]).measure == ["flop", "cpu"]
    if not torch.cuda.is_available():
        assert "expected a CUDA device, found none" in refused(benchmark, "--measure", "cuda")
