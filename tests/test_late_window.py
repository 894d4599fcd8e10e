"""The callback switches the LoRA on for the steps below tmax and for no others."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig

from acpo_utils.late_step import lora_below


@pytest.fixture
def pipeline(tiny_pipeline):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline, **options):
    return pipeline(
        "a red wall",
        num_inference_steps=10,
        guidance_scale=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **options,
    ).images


def test_the_lora_acts_below_tmax_alone(pipeline):
    states = {}
    hook = lambda module, inputs: states.__setitem__(int(inputs[1]), not layer.disable_adapters)  # noqa: E731
    layer = next(module for module in pipeline.unet.modules() if hasattr(module, "lora_A"))
    pipeline.unet.register_forward_pre_hook(hook)
    always = run(pipeline)
    assert all(states.values()) and len(states) == 10
    callback = lora_below(pipeline, 250)
    late = run(pipeline, callback_on_step_end=callback)
    assert {t for t, on in states.items() if on} == {t for t in states if t < 250} and 0 < sum(states.values()) < 5
    assert torch.equal(run(pipeline, callback_on_step_end=callback), late), "one callback serves many runs"
    pipeline.disable_lora()
    base = run(pipeline)
    assert (late - base).abs().max() > 1e-6 and (late - always).abs().max() > 1e-4
    assert torch.equal(run(pipeline, callback_on_step_end=lora_below(pipeline, 0)), base)
