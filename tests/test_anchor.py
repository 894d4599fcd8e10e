import pytest
import torch
from peft import LoraConfig, get_peft_model

from acpo_utils.anchor import base_prediction, without_adapter
from acpo_utils.losses import anchor_loss
from tests.tiny_models import tiny_unet, tiny_unet2d


@pytest.fixture
def inputs():
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 90]), torch.randn(2, 16, 32)


def with_lora(unet):
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return unet


def test_anchor_loss_is_exactly_zero_at_lora_initialisation(inputs):
    unet = with_lora(tiny_unet())
    assert anchor_loss(unet(*inputs).sample, base_prediction(unet, *inputs)).item() == 0.0


def test_base_prediction_is_the_untouched_model_and_leaves_the_adapter_on(inputs):
    expected = tiny_unet()(*inputs).sample
    unet = with_lora(tiny_unet())
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    student = unet(*inputs).sample
    base = base_prediction(unet, *inputs)
    assert torch.equal(base, expected) and not base.requires_grad
    assert torch.equal(unet(*inputs).sample, student) and not torch.allclose(student, base)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradient_reaches_every_lora_tensor_and_nothing_else(inputs, gradient_checkpointing):
    unet = with_lora(tiny_unet()).train()
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    base = base_prediction(unet, *inputs)
    anchor_loss(unet(*inputs).sample, base).backward()
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_adapter_is_on_again_after_an_error(inputs):
    unet = with_lora(tiny_unet())
    with pytest.raises(RuntimeError):
        base_prediction(unet, inputs[0][:, :3], *inputs[1:])
    assert all(parameter.requires_grad for name, parameter in unet.named_parameters() if "lora_" in name)


def test_a_lora_in_pefts_wrapper_and_a_frozen_copy():
    """A UNet2DModel has no add_adapter: peft wraps it. Without any adapter a model is its own base."""
    samples, timesteps = torch.randn(2, 3, 32, 32), torch.tensor([3, 90])
    expected = tiny_unet2d()(samples, timesteps).sample
    unet = get_peft_model(tiny_unet2d(), LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    assert anchor_loss(unet(samples, timesteps).sample, base_prediction(unet, samples, timesteps)).item() == 0.0
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    student = unet(samples, timesteps).sample
    base = base_prediction(unet, samples, timesteps)
    assert torch.equal(base, expected) and not base.requires_grad
    assert torch.equal(unet(samples, timesteps).sample, student) and not torch.allclose(student, base, atol=1e-3)
    assert all(parameter.requires_grad for name, parameter in unet.named_parameters() if "lora_" in name)
    with pytest.raises(RuntimeError), without_adapter(unet):
        raise RuntimeError
    assert torch.equal(unet(samples, timesteps).sample, student), "on again after an error"
    assert torch.equal(base_prediction(tiny_unet2d(), samples, timesteps), expected)
