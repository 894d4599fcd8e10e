"""`training_step` of the DDPM script on tiny real models: what trains, what stays, what the evaluator sees."""

import argparse
import copy

import pytest
import torch
import train_acpo_ddpm as script
from diffusers import DDPMScheduler

from acpo_utils.evaluators import TwoStreamIQA
from acpo_utils.randomness import step_generator
from tests.tiny_models import tiny_unet2d


DEFAULTS = {
    "rank": 2,
    "lora_alpha": 2,
    "lora_target_modules": "to_q,to_k,to_v,to_out.0,conv,conv1,conv2,conv_shortcut,conv_in,conv_out",
    "tmax": 100,
    "quality_weight": 1.0,
    "anchor_weight": 1.0,
    "diffusion_weight": 1.0,
    "diffusion_timesteps": "full",
    "late_start": "data",
    "late_steps": 1,
    "late_backprop_steps": None,
    "guide_perturbation": 0.0,
    "guide_clean_weight": 0.5,
    "guide_clean_weight_end": None,
    "gradient_checkpointing": False,
    "snr_gamma": None,
    "ddpm_num_inference_steps": 5,
}
FOUR_LOSSES = {"lora": [1.46726, 1.38105, 1.33669, 1.30269], "full": [1.46726, 1.33557, 1.27533, 1.28693]}


class Recorder(torch.nn.Module):
    """An evaluator that lets through and remembers what it was given."""

    def __init__(self, evaluator):
        super().__init__()
        self.evaluator, self.seen = evaluator, []

    def score(self, images, prompts=None):
        self.seen.append((images.detach(), prompts))
        return self.evaluator.score(images, prompts)


@pytest.fixture(params=["lora", "full"])
def world(request):
    """The same step with a LoRA, whose base is itself without it, and with all weights and a frozen copy."""
    unet = tiny_unet2d()
    torch.manual_seed(1)
    evaluator = Recorder(TwoStreamIQA(widths=(4, 4, 8, 8), fusion_width=8).eval().requires_grad_(False))
    evaluator.evaluator.fusion[-1].weight.mul_(50)  # random weights are nearly indifferent to the image
    torch.manual_seed(2)
    if request.param == "lora":
        unet = base_unet = script.add_lora(unet, argparse.Namespace(**DEFAULTS))
    else:
        base_unet = copy.deepcopy(unet).requires_grad_(False)
    batch = {"pixel_values": torch.rand(2, 3, 32, 32, generator=step_generator(0)) * 2 - 1}

    def step(scheduler=None, position=0, **changes):
        args = argparse.Namespace(**(DEFAULTS | changes))
        return script.training_step(
            batch, unet, base_unet, evaluator, scheduler or DDPMScheduler(), step_generator(0, position), args
        )

    return argparse.Namespace(
        step=step, unet=unet, base_unet=base_unet, evaluator=evaluator, kind=request.param, x0=batch["pixel_values"]
    )


def trained(unet):
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def move(world, std=0.05):
    """A model that has left its base: lora_B starts at zero, where lora_A gets no gradient."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trained(world.unet).values():
            parameter.add_(torch.randn_like(parameter) * std)


def test_every_trained_weight_gets_gradient_from_quality_alone_and_nothing_else_does(world):
    move(world)
    assert all(("lora_" in name) == (world.kind == "lora") for name in trained(world.unet))
    world.step(diffusion_weight=0, anchor_weight=0)[0].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained(world.unet).values())
    frozen = [p for model in (world.unet, world.base_unet, world.evaluator) for p in model.parameters()]
    assert all(p.grad is None for p in frozen if not p.requires_grad)


def test_the_lora_reaches_attention_and_convolutions(world):
    if world.kind == "full":
        assert len(trained(world.unet)) == len(list(world.unet.parameters()))
        return
    layers = {name.split(".lora_")[0].split(".")[-1] for name in trained(world.unet)}
    assert layers == {"to_q", "to_k", "to_v", "0", "conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_anchor_is_exactly_zero_at_the_start_and_the_evaluator_sees_images(world, prediction_type):
    loss, terms = world.step(DDPMScheduler(prediction_type=prediction_type))
    assert terms["loss_anchor"].item() == 0.0
    assert terms["loss_quality"].item() == pytest.approx(1 - terms["score"].mean().item(), abs=1e-6)
    expected = terms["loss_diffusion"] + terms["loss_anchor"] + terms["loss_quality"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (images, prompts), *_ = world.evaluator.seen
    assert prompts is None and images.shape == (2, 3, 32, 32) and images.min() >= 0 and images.max() <= 1


def test_the_anchor_is_the_distance_to_the_base_at_late_timesteps(world):
    """Against float64: z_t from the step's own generator, the base's prediction from a model that was never touched."""
    move(world)
    _, terms = world.step(diffusion_weight=0, quality_weight=0, tmax=50)
    generator, scheduler = step_generator(0, 0), DDPMScheduler()
    noise = torch.randn(world.x0.shape, generator=generator)
    timesteps = torch.randint(50, (2,), generator=generator)
    noisy = scheduler.add_noise(world.x0, noise, timesteps)
    with torch.no_grad():
        student = world.unet(noisy, timesteps).sample.double()
        difference = student - tiny_unet2d()(noisy, timesteps).sample.double()
    assert terms["loss_anchor"].item() == pytest.approx((difference**2).mean().item(), rel=1e-5)
    assert terms["loss_anchor"].item() > 1e-6 and "loss_quality" not in terms


def test_one_late_step_is_the_estimate_of_x0(world):
    """A model that answers with the true noise: the evaluator is shown the training image itself."""
    noise = torch.randn(world.x0.shape, generator=step_generator(0, 0))
    answer = lambda samples, timesteps, return_dict=True: (noise,)  # noqa: E731
    for late_steps in (1, 3):
        args = argparse.Namespace(**(DEFAULTS | {"anchor_weight": 0, "diffusion_weight": 0, "late_steps": late_steps}))
        batch = {"pixel_values": world.x0}
        script.training_step(batch, answer, None, world.evaluator, DDPMScheduler(), step_generator(0, 0), args)
    for images, _ in world.evaluator.seen:
        assert torch.allclose(images, world.x0 / 2 + 0.5, atol=1e-4)


def test_both_weights_zero_is_the_plain_ddpm_step(world, monkeypatch):
    monkeypatch.setattr(world.evaluator, "score", None)  # calling it would raise
    scheduler = DDPMScheduler()
    loss, terms = world.step(scheduler, quality_weight=0, anchor_weight=0)
    generator = step_generator(0, 0)
    noise = torch.randn(world.x0.shape, generator=generator)
    timesteps = torch.randint(1000, (2,), generator=generator)
    pred = world.unet(scheduler.add_noise(world.x0, noise, timesteps), timesteps).sample
    assert loss.item() == pytest.approx(((pred - noise).double() ** 2).mean().item(), rel=1e-5)
    assert set(terms) == {"loss", "loss_diffusion"}


def test_gradient_checkpointing_through_the_chain_changes_no_gradient(world):
    move(world)
    gradients, options = [], {"late_steps": 3, "late_start": "rollout", "tmax": 500, "diffusion_weight": 0}
    for checkpointing in (False, True):
        world.unet.zero_grad()
        if checkpointing:
            getattr(world.unet, "base_model", world.unet).enable_gradient_checkpointing()
        world.step(gradient_checkpointing=checkpointing, **options)[0].backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in trained(world.unet).items()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0 and torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-8), name


def test_the_number_of_passes(world, monkeypatch):
    """Base, late and full pass; sharing the late pass saves one; a rollout draws its steps above tmax first."""
    rows = []
    unet = world.unet.get_base_model() if world.kind == "lora" else world.unet
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda *a, **k: (rows.append(len(a[0])), forward(*a, **k))[1])
    base = int(world.kind == "lora")  # the frozen copy is another model
    for changes, passes in (
        ({}, 2 + base),
        ({"diffusion_timesteps": "late"}, 1 + base),
        ({"late_steps": 4}, 5 + base),
        ({"late_start": "rollout"}, 4 + 2 + base),  # t = 800, 600, 400, 200 lie above 100
    ):
        rows.clear()
        world.step(**changes)
        assert rows == [2] * passes, changes


def test_quality_falls_when_only_quality_is_optimised(world):
    optimizer = torch.optim.Adam(trained(world.unet).values(), lr=1e-2)
    losses = []
    for _ in range(10):  # the same noise each time: an optimiser that follows the gradient must get lower
        loss, _ = world.step(diffusion_weight=0, anchor_weight=0, tmax=1000)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-4


def test_the_loss_sequence_of_four_steps(world):
    """Four optimizer steps at a fixed seed: the same losses whatever ran before, and those of the day this was written.

    The tolerance lets other processors round in another order; a change of the step's mathematics is larger.
    """
    torch.manual_seed(99)
    optimizer = torch.optim.AdamW(trained(world.unet).values(), lr=1e-2)
    losses = []
    for position in range(4):
        loss, _ = world.step(position=position)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(FOUR_LOSSES[world.kind], rel=1e-3)
