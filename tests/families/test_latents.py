"""Decoders that stand in for the VAE's: their images, their gradients, and what they keep for the backward pass."""

import argparse

import pytest
import torch
import torch.nn.functional as F

from acpo_utils.families.latents import StraightThrough, build_decoder, decoder_in
from acpo_utils.late_step import checkpoint_decoder, decode_latents
from acpo_utils.training.step_cost import cost_of
from tests.tiny_models import tiny_flow_vae, tiny_klein_vae, tiny_taesd, tiny_vae


def frozen(model):
    return model.eval().requires_grad_(False)


def latents_and_probe(channels: int):
    generator = torch.Generator().manual_seed(0)
    latents = 3 * torch.randn(2, channels, 8, 8, generator=generator)
    return latents.requires_grad_(True), torch.randn(2, 3, 16, 16, generator=generator)


@pytest.mark.parametrize("shifted", [False, True], ids=["SD", "flow matching"])
def test_straight_through_has_the_images_of_one_decoder_and_the_gradient_of_another(shifted):
    vae = frozen(tiny_flow_vae(1.5, 0.4) if shifted else tiny_vae())
    vae.decoder.conv_out.bias.fill_(0.9)  # near the upper end, so that some is clamped
    tiny = frozen(tiny_taesd(latent_channels=vae.config.latent_channels, scaling_factor=0.7))
    latents, probe = latents_and_probe(vae.config.latent_channels)
    images = decode_latents(StraightThrough(vae, tiny), latents)
    assert torch.equal(images, decode_latents(vae, latents))
    found = torch.autograd.grad((images * probe).sum(), latents)[0]

    own = latents.detach() / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    raw = vae.decode(own).sample / 2 + 0.5
    inside = (raw > 0) & (raw < 1)  # where the exact image was clamped nothing comes back
    assert 0.05 < inside.float().mean() < 0.95
    through_tiny = lambda z: tiny.decode(z / 0.7).sample / 2  # noqa: E731
    expected = torch.autograd.functional.vjp(through_tiny, latents.detach(), probe * inside)[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    full = torch.autograd.grad((decode_latents(vae, latents) * probe).sum(), latents)[0]
    assert F.cosine_similarity(found.flatten(), full.flatten(), dim=0) < 0.5, "the two decoders are nothing alike"


def test_straight_through_undoes_the_patches_of_flux2_once():
    """Both decoders have the same latents of 8 channels, which the transformer sees as 32 channels of half the sides."""
    vae, other = frozen(tiny_klein_vae()), frozen(tiny_klein_vae(seed=5))
    other.bn = vae.bn
    for decoder in (vae.decoder, other.decoder):
        decoder.conv_out.weight.mul_(0.3)  # so that nothing is clamped, where no gradient comes back
    latents, probe = latents_and_probe(32)
    latents = latents[..., :4, :4]
    images = decode_latents(StraightThrough(vae, other), latents)
    assert torch.equal(images, decode_latents(vae, latents))
    found = torch.autograd.grad((images * probe).sum(), latents)[0]
    expected = torch.autograd.grad((decode_latents(other, latents) * probe).sum(), latents)[0]
    assert images.min() > 0 and images.max() < 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_straight_through_in_bf16_points_where_the_vae_does_and_keeps_half():
    vae = frozen(tiny_vae())
    straight = StraightThrough(vae, decoder_in(torch.bfloat16, vae))
    latents, probe = latents_and_probe(4)
    gradients, costs = [], []
    for decoder in (vae, straight):
        gradients.append(torch.autograd.grad((decode_latents(decoder, latents) * probe).sum(), latents)[0].flatten())
        costs.append(cost_of(lambda: decode_latents(decoder, latents)))  # noqa: B023
    assert not torch.equal(*gradients) and F.cosine_similarity(*gradients, dim=0) > 0.99
    full, cheap = costs
    assert cheap.kept < 0.6 * full.kept
    assert (cheap.forward, cheap.backward) == (2 * full.forward, full.backward)


def test_checkpointing_is_of_what_has_a_graph():
    vae = frozen(tiny_vae())
    straight = StraightThrough(vae, decoder_in(torch.bfloat16, vae))
    latents, probe = latents_and_probe(4)
    gradients, kept = [], []
    for checkpointing in (False, True):
        checkpoint_decoder(straight, checkpointing)
        kept.append(cost_of(lambda: decode_latents(straight, latents)).kept)
        gradients.append(torch.autograd.grad((decode_latents(straight, latents, 1) * probe).sum(), latents)[0])
    torch.testing.assert_close(*gradients)
    assert kept[1] < kept[0]


def test_the_flags_say_which_decoder(tmp_path):
    vae = frozen(tiny_vae())
    tiny_taesd().save_pretrained(tmp_path)

    def build(decode, decode_dtype, tiny=None):
        flags = {"decode": decode, "decode_dtype": decode_dtype, "tiny_vae_name_or_path": tiny}
        return build_decoder(vae, argparse.Namespace(**flags))

    assert build("full", "fp32") is vae and build("crop", "fp32") is vae
    assert build("full", "bf16").dtype == torch.bfloat16 and vae.dtype == torch.float32
    assert type(build("tiny", "fp32", tmp_path)).__name__ == "AutoencoderTiny"
    in_bf16 = build("straight_through", "bf16")
    assert in_bf16.vae is vae and in_bf16.backward_vae.dtype == torch.bfloat16 and in_bf16.dtype == torch.float32
    through_tiny = build("straight_through", "fp32", tmp_path)
    assert type(through_tiny.backward_vae).__name__ == "AutoencoderTiny"
