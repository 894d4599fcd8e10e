"""A LoRA of a UNet2DModel: exact round trips, fusing, checkpoints without the base's weights, and what is refused."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from acpo_utils.ddpm import load_adapter, register_adapter_hooks, save_adapter
from tests.tiny_models import tiny_unet2d


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"]


def lora_unet(seed: int = 1, rank: int = 3, targets=TARGETS, **overrides):
    """A LoRA away from its start, alpha twice the rank."""
    unet = tiny_unet2d(**overrides)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
    return get_peft_model(unet, config)


@torch.no_grad()
def predict(unet) -> torch.Tensor:
    return unet(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 600])).sample


def test_loading_and_fusing_give_the_trained_models_output(tmp_path):
    unet = lora_unet()
    save_adapter(unet, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(tiny_unet2d(), tmp_path)
    assert torch.allclose(predict(loaded), predict(unet), atol=1e-6)
    assert not torch.allclose(predict(loaded), predict(tiny_unet2d()), atol=1e-2)
    fused = loaded.merge_and_unload()
    assert type(fused) is type(tiny_unet2d()) and torch.allclose(predict(fused), predict(unet), atol=1e-4)
    assert fused.state_dict().keys() == tiny_unet2d().state_dict().keys()


def test_load_into_an_adapter_that_is_there(tmp_path):
    first, second = lora_unet(1), lora_unet(2)
    save_adapter(first, tmp_path)
    load_adapter(second, tmp_path)
    assert torch.equal(predict(second), predict(first))


@pytest.mark.parametrize("other", [{"rank": 4}, {"targets": ["to_q"]}, {"block_out_channels": (8, 24)}])
def test_another_lora_is_refused_and_nothing_is_loaded(tmp_path, other):
    save_adapter(lora_unet(1, **other), tmp_path)
    unet = lora_unet(2)
    before = predict(unet)
    with pytest.raises(ValueError, match="another model, or has another rank or other target modules"):
        load_adapter(unet, tmp_path)
    assert torch.equal(predict(unet), before)


def test_missing_and_damaged_files_are_named(tmp_path):
    unet = lora_unet()
    with pytest.raises(ValueError, match="expected a folder with adapter_config.json"):
        load_adapter(unet, tmp_path)
    file = save_adapter(unet, tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        load_adapter(unet, tmp_path)


def test_checkpoints_hold_the_lora_and_not_the_base(tmp_path):
    accelerator = Accelerator(cpu=True)
    unet = accelerator.prepare(lora_unet(1))
    register_adapter_hooks(accelerator, unet)
    trained = predict(unet)
    accelerator.save_state(str(tmp_path / "state"))
    assert [path.name for path in (tmp_path / "state").glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert all("lora_" in name for name in load_file(tmp_path / "state" / "adapter_model.safetensors"))
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert not torch.equal(predict(unet), trained)
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(predict(unet), trained)
