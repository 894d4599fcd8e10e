"""The demo's VAE and text encoder: where the VAE starts, and what the text encoder learns before the U-Net."""

import importlib.util
from argparse import Namespace

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from tests import REPOSITORY
from tests.tiny_models import tiny_taesd, tiny_tokenizer, tiny_vae


DEMO = REPOSITORY / "examples" / "demo"


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_patch_of_the_latents_has_8_rows_and_4_columns():
    latents = torch.arange(2 * 4 * 16 * 16).view(2, 4, 16, 16)
    patches = load_script("train_pipeline").patches(latents)  # (2, 8, 128)
    assert patches.shape == (2, 8, 128)
    torch.testing.assert_close(patches[1, 0], latents[1, :, :8, :4].flatten())
    torch.testing.assert_close(patches[1, 6], latents[1, :, 8:, 8:12].flatten())


ROWS = [
    {"content": "fox", "style": "noto", "background": "mint"},
    {"content": "owl", "style": "noto", "background": "teal"},
    {"content": "cat", "style": "blob", "background": "mint"},
]


def test_captions_are_drawn_anew_from_all_templates():
    script, generator = load_script("train_pipeline"), torch.Generator().manual_seed(0)
    input_ids = script.tokenize_captions(tiny_tokenizer(), ROWS)  # (3, 6, tokens)
    assert input_ids.shape[:2] == (3, 6)
    chosen = torch.tensor([1, 2]).repeat(200)
    drawn = script.draw_captions(input_ids, chosen, generator)
    for row in (1, 2):
        assert {tuple(ids) for ids in drawn[chosen == row].tolist()} == {tuple(ids) for ids in input_ids[row].tolist()}


@pytest.mark.slow  # Muon computes in bf16: four minutes on a processor without AVX-512 BF16, seconds with it
def test_the_text_encoder_learns_which_drawing_a_caption_means():
    script, tokenizer = load_script("train_pipeline"), tiny_tokenizer()
    input_ids = script.tokenize_captions(tokenizer, ROWS)
    torch.manual_seed(0)
    latents = torch.randn(3, 4, 16, 16)
    text_encoder = script.new_text_encoder(tokenizer)
    script.fit_text_encoder(
        text_encoder, input_ids, latents, Namespace(text_encoder_steps=60, train_batch_size=8, seed=0)
    )
    head = script.fit_head(text_encoder, input_ids[:, 0], latents)
    with torch.no_grad():
        prompt_embeds = text_encoder(input_ids[:, 0], return_dict=False)[0]
        assert script.layout_loss(prompt_embeds, latents, head) < 0.05
        assert script.layout_loss(prompt_embeds.roll(1, 0), latents, head) > 1


def test_latents_between_two_others_cost_nothing():
    script = load_script("train_vae")
    start, end, share = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.0, 0.3]).view(2, 1, 1, 1)
    between = torch.lerp(start, end, share)
    assert script.affine_loss(between, (start, end), share) == 0
    away = between + 0.5 * torch.randn_like(between)
    loss = script.affine_loss(away, (start, end), share)
    assert loss > 0.05
    # A share of the variance: the size of the latents does not matter.
    torch.testing.assert_close(script.affine_loss(3 * away, (3 * start, 3 * end), share), loss)


def test_the_vaes_loss_counts_noise_and_bent_latents():
    script = load_script("train_vae")
    torch.manual_seed(0)
    vae, images = script.new_vae(), torch.rand(2, 3, 64, 64)
    others, share = images.flip(0), torch.full((2, 1, 1, 1), 0.5)

    def loss(**weights):
        torch.manual_seed(0)
        settings = Namespace(**{"kl_weight": 0.0, "latent_noise": 0.0, "affine_weight": 0.0} | weights)
        return script.training_step(vae, images, others, share, settings)

    with torch.no_grad():
        plain = loss()
        assert loss(affine_weight=2.0) > plain + 0.01
        assert loss(latent_noise=1.0) > plain + 0.01
        torch.testing.assert_close(loss(affine_weight=2.0) - plain, 2 * (loss(affine_weight=1.0) - plain))
    loss(affine_weight=2.0, latent_noise=0.2).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


def test_pairs_are_of_one_drawing():
    drawings = [[0, 3, 5], [1, 2, 4, 6]]
    pairs = load_script("train_vae").pairs_of_backgrounds(drawings, 100, torch.Generator().manual_seed(0))
    assert pairs.shape == (2, 100) and set(pairs.flatten().tolist()) == set(range(7))
    assert all(any(a in rows and b in rows for rows in drawings) for a, b in pairs.T.tolist())


def test_the_vae_starts_with_signals_of_one_size_and_almost_no_noise():
    torch.manual_seed(0)
    vae = load_script("train_vae").new_vae()
    assert all(not block.conv2.weight.any() for block in vae.modules() if isinstance(block, ResnetBlock2D))
    images = torch.randn(2, 3, 64, 64).clamp(-1, 1)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        assert posterior.mean.shape == (2, 4, 16, 16)
        assert 0.2 < posterior.mean.std() < 5
        torch.testing.assert_close(posterior.logvar, torch.full_like(posterior.mean, -6.0))
        assert 0.2 < vae.decode(posterior.mean).sample.std() < 5


def test_a_tiny_decoder_is_taught_what_becomes_of_the_guides_gradient():
    script = load_script("train_tiny_vae")
    vae = tiny_vae().eval().requires_grad_(False)
    probe = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    guide = Namespace(score=lambda images, prompts: torch.sigmoid((images * probe).mean((1, 2, 3))))
    torch.manual_seed(0)
    latents, images, image_gradients, latent_gradients = script.guide_gradients(
        vae, guide, torch.randn(3, 4, 8, 8), ["a", "b", "c"]
    )
    torch.testing.assert_close(latent_gradients.flatten(1).norm(dim=1), torch.ones(3))
    assert images.min() >= 0 and images.max() <= 1 and not image_gradients.requires_grad

    def gradient_loss(decoder):
        steps = [
            script.gradient_step(decoder, latents.clone(), images, image_gradients, latent_gradients, weight)
            for weight in (0.0, 1.0)
        ]
        return steps[1] - steps[0]

    exact = Namespace(decode=lambda z, return_dict: vae.decode(z / vae.config.scaling_factor, return_dict=False))
    tiny = tiny_taesd().train()
    assert gradient_loss(exact).item() == pytest.approx(0, abs=1e-5)
    before = gradient_loss(tiny)
    assert before > 0.5
    optimizer = torch.optim.Adam(tiny.decoder.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        gradient_loss(tiny).backward()
        optimizer.step()
    assert gradient_loss(tiny) < 0.8 * before
