"""ACPO's rivals in the place of the script's step: each loss and gradient against a direct computation."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import rival_methods as rivals
import torch
import train_acpo_lora_sd as script
from diffusers import DDIMScheduler
from peft import LoraConfig
from transformers import CLIPTextModel

from acpo_utils.evaluators import load_evaluator
from acpo_utils.late_step import decode_latents
from acpo_utils.randomness import step_generator
from tests.launching import EXAMPLES, fresh_process, launch, refused
from tests.tiny_models import tiny_scheduler, tiny_tokenizer, tiny_unet, tiny_vae


SETTINGS = {
    "tmax": 100,
    "quality_weight": 1.0,
    "anchor_weight": 1.0,
    "diffusion_weight": 0.0,
    "diffusion_timesteps": "full",
    "late_start": "rollout",
    "late_steps": 1,
    "late_backprop_steps": None,
    "guide_perturbation": 0.0,
    "guide_clean_weight": 0.5,
    "scored_guidance": True,
    "decode": "full",
    "decode_batch_size": None,
    "snr_gamma": None,
    "num_inference_steps": 5,
    "guidance_scale": 2.0,
    "train_prompts": "no images",
    "resolution": 32,
    "reward_mean": 0.5,
    "reward_std": 0.1,
}
SCHEDULE = [801, 601, 401, 201, 1]  # of five steps


@pytest.fixture
def world(tiny_pipeline, tiny_guide):
    """The tiny models, with a LoRA that does something, and `step`: a method's, or the script's own for "acpo"."""
    text_encoder = CLIPTextModel.from_pretrained(tiny_pipeline, subfolder="text_encoder").requires_grad_(False)
    vae, unet = tiny_vae().requires_grad_(False).eval(), tiny_unet().requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    torch.manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    evaluator = load_evaluator(f"ipce:{tiny_guide}")
    prompts = ["a red wall", "a blue wall"]
    ids = tiny_tokenizer()([*prompts, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    embeds = text_encoder(ids, return_dict=False)[0]
    batch = {
        "pixel_values": torch.rand(2, 3, 32, 32, generator=step_generator(0)) * 2 - 1,
        "input_ids": ids[:2],
        "negative_conditions": {"prompt_embeds": embeds[2:]},
        "prompts": prompts,
    }
    scheduler = tiny_scheduler()

    def step(method, position=0, **changes):
        args = argparse.Namespace(**(SETTINGS | changes))
        run = script.training_step if method == "acpo" else lambda *given: rivals.training_step(method, *given)
        generator = step_generator(0, position)
        anchor = args.anchor_weight
        return run(batch, unet, vae, vae, text_encoder, evaluator, scheduler, generator, anchor, args)

    def guided(latents, timestep):
        """As a pipeline does it, the two halves one by one."""
        negative, positive = (
            unet(latents, timestep, part.expand(2, -1, -1), return_dict=False)[0] for part in (embeds[2:], embeds[:2])
        )
        return negative + 2.0 * (positive - negative)

    def score(latents):
        return evaluator.score(decode_latents(vae, latents), prompts)

    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(5)
    assert ddim.timesteps.tolist() == SCHEDULE
    return SimpleNamespace(step=step, unet=unet, vae=vae, guided=guided, score=score, ddim=ddim)


def gradients(world, loss):
    """{name: gradient} of the LoRA's weights."""
    named = {name: parameter for name, parameter in world.unet.named_parameters() if "lora_" in name}
    return dict(zip(named, torch.autograd.grad(loss, named.values())))


def assert_close(found, expected, scale=1.0):
    assert any(gradient.abs().max() > 1e-7 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], scale * gradient, rtol=1e-3, atol=1e-7)


def last_estimate(world, position=0):
    """DRaFT-1's x0, by diffusers' scheduler: no gradient but through the last of the sampling steps. And its prediction."""
    latents = torch.randn(2, 4, 16, 16, generator=step_generator(0, position))
    with torch.no_grad():
        for timestep in world.ddim.timesteps[:-1]:
            latents = world.ddim.step(world.guided(latents, timestep), timestep, latents).prev_sample
    last = world.ddim.timesteps[-1]
    pred = world.guided(latents, last)
    return world.ddim.step(pred, last, latents).pred_original_sample, pred, latents


@pytest.mark.parametrize("method", rivals.METHODS)
def test_gradient_reaches_the_lora_and_nothing_else(world, method):
    loss, terms = world.step(method, diffusion_weight=1.0, reward_mean=0.9)
    loss.backward()
    assert torch.isfinite(loss) and terms["score"].shape == (2,)
    for name, parameter in world.unet.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("lora_" in name), name


@pytest.mark.parametrize("method", rivals.METHODS)
def test_the_same_place_of_a_run_has_the_same_loss_and_another_has_another(world, method):
    first, again, other = (world.step(method, position=position)[1]["score"] for position in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_draft_1_is_the_script_with_these_flags(world):
    loss, terms = world.step("acpo", anchor_weight=0.0)
    x0, _, _ = last_estimate(world)
    scores = world.score(x0)
    torch.testing.assert_close(terms["score"], scores, rtol=1e-4, atol=1e-6)
    assert loss.item() == pytest.approx(1 - scores.mean().item(), abs=1e-6)
    assert_close(gradients(world, loss), gradients(world, -scores.mean()))


def test_draft_plus_is_draft_1_held_to_the_frozen_model(world):
    loss, terms = world.step("draft+", anchor_weight=0.7)
    x0, pred, latents = last_estimate(world)
    world.unet.disable_adapters()
    with torch.no_grad():
        base_pred = world.guided(latents, world.ddim.timesteps[-1])
    world.unet.enable_adapters()
    penalty = (pred - base_pred).square().mean()
    assert terms["loss_anchor"].item() == pytest.approx(penalty.item(), rel=1e-3) and penalty > 1e-5
    expected = -((world.score(x0) - 0.5) / 0.1).mean() + 0.7 * penalty
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_close(gradients(world, loss), gradients(world, expected))


def test_refl_stops_in_the_last_quarter_without_guidance(world):
    seen = []
    hook = world.unet.register_forward_pre_hook(lambda _, given: seen.append((len(given[0]), int(given[1].max()))))
    stops = set()
    for position in range(12):
        seen.clear()
        world.step("refl", position, num_inference_steps=8)
        assert all(rows == 2 for rows, _ in seen), "guidance would take twice the rows"
        assert [t for _, t in seen] == [876, 751, 626, 501, 376, 251, 126, 1][: len(seen)]
        stops.add(len(seen))
    hook.remove()
    assert stops == {7, 8}


def test_refl_is_a_hinge_of_a_standardised_reward(world):
    loss, terms = world.step("refl", reward_mean=0.9, reward_std=0.2)
    rewards = (terms["score"] - 0.9) / 0.2
    assert (rewards < 2).all() and loss.item() == pytest.approx((2 - rewards).mean().item(), rel=1e-5)
    loss, _ = world.step("refl", reward_mean=0.0, reward_std=1e-2)  # all rewards far above 2
    assert loss.item() == 0 and all(gradient.abs().sum() == 0 for gradient in gradients(world, loss).values())


def test_refls_pretraining_loss_is_the_scripts(world):
    """Of all timesteps and of images, at the weight of --diffusion_weight."""
    _, terms = world.step("refl", train_prompts=None, diffusion_weight=1.0)
    loss, _ = world.step("refl", train_prompts=None, diffusion_weight=3.0)
    assert loss.item() == pytest.approx((terms["loss_quality"] + 3 * terms["loss_diffusion"]).item(), rel=1e-5)
    assert 0.5 < terms["loss_diffusion"].item() < 3, "of random weights, against noise of variance 1"


@pytest.mark.parametrize("kept", [5, 2])
def test_alignprop_is_backpropagation_through_the_last_steps(world, monkeypatch, kept):
    """Of all five it is the whole trajectory, whose every step diffusers takes with eta = 1 here."""
    monkeypatch.setattr(rivals, "truncation", lambda *_: kept)
    loss, _ = world.step("alignprop")
    generator = step_generator(0, 0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    for number, timestep in enumerate(world.ddim.timesteps):
        with torch.set_grad_enabled(number >= 5 - kept):
            noise = torch.randn(2, 4, 16, 16, generator=generator)
            pred = world.guided(latents, timestep)
            latents = world.ddim.step(pred, timestep, latents, eta=1.0, variance_noise=noise).prev_sample
    expected = -world.score(latents).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert_close(gradients(world, loss), gradients(world, expected))


def test_truncation_is_drawn_as_published():
    generator = torch.Generator().manual_seed(0)
    drawn = np.array([rivals.truncation(50, generator) for _ in range(4000)])
    assert drawn.min() == 1 and drawn.max() <= 50
    assert abs(np.median(drawn) - 8) <= 0.5 and abs(drawn.mean() - 8.3) < 0.3  # 50 - N(42, 5), none below 1
    assert {rivals.truncation(3, generator) for _ in range(200)} == {1}
    assert {rivals.truncation(15, generator) for _ in range(2000)} >= {1, 2, 3, 4, 5}


class ToyPolicy:
    """Ten steps of z' ~ N(theta z, std^2), and a reward that is no function of theta: what `ddpo` asks of a Sampler."""

    def __init__(self, theta, stds):
        self.theta, self.stds = theta, stds
        self.timesteps = torch.arange(len(stds))
        self.dtype, self.guided = torch.float32, None
        self.generator = torch.Generator().manual_seed(0)
        self.visited = []

    def noise(self):
        return torch.randn(6, 2, 3, 3, generator=self.generator)

    start = noise

    def action(self, predict, latents, timestep):
        self.visited.append(latents)
        return self.theta * latents, self.stds[timestep]

    def score(self, latents):
        self.visited.append(latents)
        return latents.flatten(1).mean(1).sigmoid()


@pytest.mark.parametrize("last_std", [0.5, 0.0])
def test_ddpos_gradient_is_reinforce(last_std):
    """Against float64: the mean over steps and samples of A d log p(z' | z) / d theta; a step that draws nothing is left out."""
    theta = torch.tensor(0.8, requires_grad=True)
    stds = torch.tensor([0.3, 0.4, 0.6, last_std])
    policy = ToyPolicy(theta, stds)
    terms = rivals.ddpo(policy)
    (found,) = torch.autograd.grad(terms["loss_quality"], theta)

    trajectory = [latents.double().numpy() for latents in policy.visited[:5]]
    rewards = 1 / (1 + np.exp(-trajectory[-1].reshape(6, -1).mean(1)))
    advantages = (rewards - rewards.mean()) / rewards.std()
    slopes = []
    for before, after, std in zip(trajectory, trajectory[1:], stds.double().numpy()):
        if std:
            slope = (after - 0.8 * before) * before / std**2
            slopes.append(slope.reshape(6, -1).mean(1))
    assert len(slopes) == (4 if last_std else 3)
    expected = -np.mean([advantages * slope for slope in slopes])
    assert terms["loss_quality"].item() == pytest.approx(0, abs=1e-6), "ratios of 1, advantages of mean 0"
    assert found.item() == pytest.approx(expected, rel=1e-4) and abs(expected) > 1e-3


def test_what_the_methods_do_not_read_is_refused():
    run = EXAMPLES / "rival_methods.py"
    assert "takes no --guide_perturbation" in refused(run, "--method", "ddpo", "--guide_perturbation", 2)
    assert "takes no --late_every" in refused(run, "--method", "refl", "--late_every", 2)
    assert "needs a --quality_weight" in refused(run, "--method", "refl", "--quality_weight", 0)
    assert "none_such" in refused(run, "--method", "refl", "--none_such", 0)


def test_the_demos_rivals_sample_at_every_step():
    assert rivals.parse_args(["--method", "refl"]).late_every == 1
    assert rivals.parse_args(["--method", "acpo"]).late_every == 3, "the demo as it is"


def test_a_run_is_the_scripts_own_but_for_its_step(sd_flags, lora_of, tmp_path):
    flags = sd_flags(method="ddpo", num_inference_steps=3, guidance_scale=2, max_train_steps=2, checkpointing_steps=1)
    with fresh_process():
        rivals.main(rivals.parse_args(flags))
    steps = [line.split(",")[0] for line in (tmp_path / "out" / "seconds.csv").read_text().splitlines()]
    assert steps == ["1", "2"] and any(weight.abs().sum() > 0 for weight in lora_of().values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "fine-tuned by ddpo" in card and "- acpo" not in card
    before = lora_of("out/checkpoint-1")
    assert any(not torch.equal(weight, before[name]) for name, weight in lora_of().items())


def test_a_resumed_run_equals_an_uninterrupted_one(sd_flags, lora_of):
    def run(output, **changes):
        flags = sd_flags(output, method="refl", num_inference_steps=4, checkpointing_steps=1, **changes)
        with fresh_process():
            rivals.main(rivals.parse_args(flags))

    run("whole", max_train_steps=2)
    run("halves", max_train_steps=1)
    run("halves", max_train_steps=2, resume_from_checkpoint="latest")
    whole, halves = lora_of("whole"), lora_of("halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    with pytest.raises(ValueError, match="method"):
        flags = sd_flags("halves", method="alignprop", num_inference_steps=4, resume_from_checkpoint="latest")
        with fresh_process():
            rivals.main(rivals.parse_args(flags))


@pytest.mark.slow
def test_the_command_starts(sd_flags, tmp_path):
    launch(EXAMPLES / "rival_methods.py", *sd_flags(method="draft+", num_inference_steps=4, max_train_steps=2))
    assert len((tmp_path / "out" / "seconds.csv").read_text().splitlines()) == 2
