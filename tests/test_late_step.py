from copy import deepcopy
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.image_processor import VaeImageProcessor

from acpo_utils.families import stable_diffusion
from acpo_utils.families.latents import decoder_in
from acpo_utils.late_step import (
    checkpoint_decoder,
    crop_latents,
    decode_latents,
    denoise_late_steps,
    predict_original_sample,
    rollout_late_latents,
    rollout_late_samples,
    sample_late_timesteps,
    without_prompt,
)
from acpo_utils.training.step_cost import Meter
from tests.tiny_models import tiny_scheduler, tiny_taesd, tiny_unet, tiny_vae


PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


def test_late_timesteps_fill_the_window_and_repeat_with_the_seed():
    drawn = sample_late_timesteps(2000, 10, torch.Generator().manual_seed(0))
    assert sorted(set(drawn.tolist())) == list(range(10))
    assert torch.equal(drawn, sample_late_timesteps(2000, 10, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_original_sample_agrees_with_the_ddim_scheduler(prediction_type):
    scheduler = tiny_scheduler(prediction_type=prediction_type)
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    ddim.set_timesteps(1000)
    latents, pred = torch.randn(3, 4, 6, 8), torch.randn(3, 4, 6, 8)
    for timestep in (1, 99, 500):
        estimate = predict_original_sample(scheduler, pred, torch.full((3,), timestep), latents)
        expected = ddim.step(pred, timestep, latents).pred_original_sample
        assert torch.allclose(estimate, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_true_prediction_gives_back_the_clean_latents(prediction_type):
    """float64 inputs; each sample has its own timestep, and the latents are not square."""
    from acpo_utils.losses import diffusion_target

    scheduler = tiny_scheduler(prediction_type=prediction_type)
    x0, noise, timesteps = torch.randn(4, 4, 4, 10), torch.randn(4, 4, 4, 10), torch.tensor([0, 3, 50, 99])
    noisy = scheduler.add_noise(x0, noise, timesteps)
    pred = diffusion_target(scheduler, x0, noise, timesteps)
    assert torch.allclose(predict_original_sample(scheduler, pred, timesteps, noisy), x0, atol=1e-5)
    chain = denoise_late_steps(
        lambda z, t: diffusion_target(scheduler, x0, noise, t), scheduler, pred, timesteps, noisy, num_steps=4
    )
    assert torch.allclose(chain, x0, atol=1e-4)


def test_chain_agrees_with_the_ddim_scheduler_step_by_step():
    scheduler = tiny_scheduler()
    predict = lambda z, t: torch.tanh(z) * 0.3 + t.view(-1, 1, 1, 1) / 500  # noqa: E731
    start, timesteps = torch.randn(2, 4, 5, 5), torch.tensor([90, 90])
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False, set_alpha_to_one=True)
    ddim.set_timesteps(1000)
    ddim.num_inference_steps = 1000 // 30  # a DDIM step then goes 30 timesteps down, as the chain 90, 60, 30, 0 does
    latents = start
    for timestep in (90, 60):
        latents = ddim.step(predict(latents, torch.tensor([timestep] * 2)), timestep, latents).prev_sample
    expected = ddim.step(predict(latents, torch.tensor([30] * 2)), 30, latents).pred_original_sample
    chain = denoise_late_steps(predict, scheduler, predict(start, timesteps), timesteps, start, num_steps=3)
    assert torch.allclose(chain, expected, atol=1e-4)


def test_truncation_cuts_the_gradient_and_not_the_value():
    scheduler = tiny_scheduler()
    weight = torch.tensor(0.5, requires_grad=True)
    calls = []

    def predict(z, t):
        calls.append(torch.is_grad_enabled())
        return weight * z

    z, t = torch.randn(2, 4, 3, 3), torch.tensor([80, 40])
    outcomes = {}
    for backprop_steps in (None, 1):
        calls.clear()
        z0 = denoise_late_steps(predict, scheduler, predict(z, t), t, z, num_steps=3, backprop_steps=backprop_steps)
        (gradient,) = torch.autograd.grad(z0.sum(), weight)
        outcomes[backprop_steps] = (z0.detach(), gradient, list(calls))
    assert torch.allclose(outcomes[None][0], outcomes[1][0])
    assert not torch.allclose(outcomes[None][1], outcomes[1][1])
    assert outcomes[None][2] == [True, True, True] and outcomes[1][2] == [True, False, True]
    with pytest.raises(ValueError, match="backprop_steps"):
        denoise_late_steps(predict, scheduler, z, t, z, num_steps=2, backprop_steps=3)


def test_decode_matches_the_image_processor_and_lies_in_0_1():
    vae = tiny_vae().eval()
    latents = torch.randn(2, 4, 8, 12) * 3 * vae.config.scaling_factor
    images = decode_latents(vae, latents)
    decoded = vae.decode(latents / vae.config.scaling_factor).sample
    assert images.shape == (2, 3, 16, 24) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, VaeImageProcessor().postprocess(decoded.detach(), output_type="pt"))


def test_decoding_in_lots_gives_the_same_images_and_gradient_and_keeps_less():
    vae = tiny_vae().eval().requires_grad_(False)
    latents, probe = (torch.randn(5, 4, 4, 4) * 0.1).requires_grad_(True), torch.randn(5, 3, 8, 8)
    images, gradients, kept = {}, {}, {}
    for lot in (None, 1, 2, 5):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):  # noqa: B023
            images[lot] = decode_latents(vae, latents, lot)
        kept[lot] = sum(sizes)
        (gradients[lot],) = torch.autograd.grad((images[lot] * probe).sum(), latents)
    for lot in (1, 2, 5):
        torch.testing.assert_close(images[lot], images[None], rtol=0, atol=1e-5)
        torch.testing.assert_close(gradients[lot], gradients[None], rtol=1e-3, atol=2e-4)  # another batch size rounds
        assert kept[lot] < kept[None] / 10


def test_decode_gradient_with_and_without_checkpointing_and_against_differences():
    vae = tiny_vae().eval().requires_grad_(False)
    latents = (torch.randn(1, 4, 4, 4) * 0.1).requires_grad_(True)
    probe = torch.randn(1, 3, 8, 8)
    gradients = []
    for checkpointing in (False, True):
        checkpoint_decoder(vae, checkpointing)
        gradients.append(torch.autograd.grad((decode_latents(vae, latents) * probe).sum(), latents)[0])
    assert torch.allclose(*gradients, atol=1e-6)
    step = 5e-4 * torch.randn_like(latents)
    with torch.no_grad():
        difference = ((decode_latents(vae, latents + step) - decode_latents(vae, latents - step)) * probe).sum() / 2
    assert difference.item() == pytest.approx((gradients[0] * step).sum().item(), rel=0.02, abs=1e-5)


def test_a_checkpointed_decoder_peaks_lower_than_by_diffusers_switch_and_is_copied_with_its_own_weights():
    """At shapes where activations outweigh weights; counted on real tensors, as the estimate counts on fake ones."""
    vae = tiny_vae().eval().requires_grad_(False)
    latents = (torch.randn(1, 4, 32, 32) * 0.1).requires_grad_(True)
    peaks = {}
    for how in ("not at all", "by diffusers", "each block"):
        vae.enable_gradient_checkpointing() if how == "by diffusers" else vae.disable_gradient_checkpointing()
        checkpoint_decoder(vae, how == "each block")
        with Meter() as meter:
            decode_latents(vae, latents).sum().backward()
        peaks[how] = meter.peak
    assert peaks["each block"] < 0.85 * peaks["by diffusers"] < peaks["not at all"]

    copy = deepcopy(vae)
    with torch.no_grad():
        before = decode_latents(vae, latents)
        for parameter in vae.decoder.parameters():
            parameter.zero_()
        assert torch.equal(decode_latents(copy, latents), before)
    checkpoint_decoder(vae, False)
    assert not any("forward" in vars(module) for module in vae.modules())


def test_a_tiny_decoders_blocks_are_checkpointed_too():
    vae = tiny_taesd(num_decoder_blocks=(3, 1)).eval().requires_grad_(False)
    latents = torch.randn(1, 4, 16, 16, requires_grad=True)
    gradients, peaks = [], []
    for checkpointing in (False, True):
        checkpoint_decoder(vae, checkpointing)
        with Meter() as meter:
            gradients.append(torch.autograd.grad(decode_latents(vae, latents).square().sum(), latents)[0])
        peaks.append(meter.peak)
    assert torch.equal(*gradients) and peaks[1] < peaks[0]


def test_a_decode_in_bf16_is_the_decode_but_for_rounding_and_leaves_the_vae():
    vae = tiny_vae().eval().requires_grad_(False)
    decoder = decoder_in(torch.bfloat16, vae)
    latents = (torch.randn(2, 4, 8, 8) * 0.1).requires_grad_(True)
    images, gradients = [], []
    for model in (vae, decoder):
        images.append(decode_latents(model, latents))
        gradients.append(torch.autograd.grad(images[-1].square().sum(), latents)[0])
    assert {image.dtype for image in images} == {gradient.dtype for gradient in gradients} == {torch.float32}
    assert 0 < (images[0] - images[1]).abs().max() < 0.02
    assert torch.nn.functional.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.99
    assert decoder.encoder is None and decoder.dtype == torch.bfloat16
    assert vae.encoder is not None and {parameter.dtype for parameter in vae.parameters()} == {torch.float32}


def test_rollout_without_guidance_asks_for_the_prompt_alone():
    """As diffusers' pipelines do at a guidance scale up to 1; and negative conditions leave others as they are."""
    seen = []

    def predict(latents, timestep, conditions):
        seen.append(conditions["prompt_embeds"])
        return 0.1 * latents

    embeds = {"prompt_embeds": torch.randn(2, 3, 4), "size": torch.randn(2, 6)}
    negative = {"prompt_embeds": torch.zeros(1, 3, 4)}
    both = without_prompt(embeds, negative)
    assert torch.equal(both["size"], embeds["size"]) and both["prompt_embeds"].shape == (2, 3, 4)
    for scale, rows in ((0.0, 2), (1.0, 2), (1.5, 4)):
        seen.clear()
        rollout_late_latents(predict, tiny_scheduler(), embeds, negative, (2, 4, 4, 4), 300, 5, scale)
        assert {len(each) for each in seen} == {rows}
        assert torch.equal(seen[0][-2:], embeds["prompt_embeds"])


def test_rollout_ends_inside_the_window():
    unet, scheduler = tiny_unet().eval(), tiny_scheduler()
    embeds, negative = {"prompt_embeds": torch.randn(2, 16, 32)}, {"prompt_embeds": torch.randn(1, 16, 32)}
    predict = partial(stable_diffusion.predict, unet)
    latents, timesteps = rollout_late_latents(
        predict,
        scheduler,
        embeds,
        negative,
        (2, 4, 8, 8),
        300,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
    )
    assert latents.shape == (2, 4, 8, 8) and not latents.requires_grad
    assert timesteps.tolist() == [201, 201]  # leading spacing with offset 1: 901, ..., 301, 201
    with pytest.raises(ValueError, match="none below tmax 1"):
        rollout_late_latents(predict, scheduler, embeds, negative, (2, 4, 8, 8), 1, num_inference_steps=10)


def test_rollout_without_guidance_is_the_ddim_pipelines_own_sampling():
    """Down to the last step: the pipeline then has only the step to x0 left."""
    from diffusers import DDIMPipeline

    from tests.tiny_models import tiny_unet2d

    unet, scheduler = tiny_unet2d(), DDPMScheduler()
    seen = []
    hook = unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pipeline = DDIMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=5)
    hook.remove()
    samples, timesteps = rollout_late_samples(
        lambda z, t: unet(z, t).sample, scheduler, (2, 3, 32, 32), 200, 5, torch.Generator().manual_seed(0)
    )
    assert timesteps.tolist() == [0, 0] and not samples.requires_grad
    assert torch.allclose(samples, seen[-1], atol=1e-6)


def test_windows_lie_anywhere_inside_and_are_the_same_for_a_batch():
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(9), indexing="ij")
    latents = torch.stack([rows, columns]).expand(2, 2, 6, 9)
    corners = set()
    for seed in range(200):
        window = crop_latents(latents, 4, torch.Generator().manual_seed(seed))
        top, left = window[0, :, 0, 0].tolist()
        assert torch.equal(window, latents[..., top : top + 4, left : left + 4]) and window.shape == (2, 2, 4, 4)
        corners.add((top, left))
    assert corners == {(top, left) for top in range(3) for left in range(6)}
    assert torch.equal(crop_latents(latents[..., :6], 6), latents[..., :6])
