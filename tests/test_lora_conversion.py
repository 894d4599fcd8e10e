"""acpo_utils.lora: kohya's names are read as diffusers' are; options that would be ignored in silence are refused."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from acpo_utils.lora import (
    check_lora_options,
    check_target_modules,
    load_lora,
    read_lora,
    read_lora_config,
    save_lora,
    write_lora,
)
from tests.tiny_models import tiny_unet, tiny_unet2d


ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
# As they stand in files of kohya's trainer and in the tables of those who read them.
KNOWN_NAMES = {
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": "down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": "mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj": "up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2": "up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2",
    "down_blocks.2.attentions.0.proj_in": "down_blocks_2_attentions_0_proj_in",
    "mid_block.attentions.0.proj_out": "mid_block_attentions_0_proj_out",
    "down_blocks.1.resnets.0.conv_shortcut": "down_blocks_1_resnets_0_conv_shortcut",
    "mid_block.resnets.1.time_emb_proj": "mid_block_resnets_1_time_emb_proj",
    "down_blocks.0.downsamplers.0.conv": "down_blocks_0_downsamplers_0_conv",
    "up_blocks.1.upsamplers.0.conv": "up_blocks_1_upsamplers_0_conv",
    "time_embedding.linear_2": "time_embedding_linear_2",
    "conv_in": "conv_in",
    "conv_out": "conv_out",
}


def layers_of(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every layer that a LoRA can take."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: module for name, module in unet.named_modules() if isinstance(module, kinds)}


def lora_unet(targets: list[str], rank: int = 3, alpha: float = 7, trained: bool = True) -> UNet2DConditionModel:
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if trained and "lora_" in name:  # lora_B starts at zero: move it, so that the LoRA does something
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return unet


def kohya_tensors(unet: UNet2DConditionModel, alpha: float | None) -> dict[str, torch.Tensor]:
    """The adapter in kohya's names, by the modules' own names."""
    tensors = {}
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A"):
            layer = "lora_unet_" + name.replace(".", "_")
            tensors[f"{layer}.lora_down.weight"] = module.lora_A["default"].weight.detach().clone()
            tensors[f"{layer}.lora_up.weight"] = module.lora_B["default"].weight.detach().clone()
            if alpha is not None:
                tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    return tensors


def predict(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([3, 70]), text, return_dict=False)[0]


# --- kohya's files


def test_every_layer_of_stable_diffusion_has_its_name_back(tmp_path):
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)  # that of SD-1.x
    layers = layers_of(unet)
    assert KNOWN_NAMES.keys() <= layers.keys() and len(layers) == 282
    tensors = {}
    for layer in layers:
        name = "lora_unet_" + KNOWN_NAMES.get(layer, layer.replace(".", "_"))
        tensors[f"{name}.lora_down.weight"] = torch.zeros(1, 2)
        tensors[f"{name}.lora_up.weight"] = torch.zeros(2, 1)
    save_file(tensors, tmp_path / "kohya.safetensors")
    weights, config = read_lora(tmp_path / "kohya.safetensors")
    assert config == {"rank": 1, "alpha": 1, "target_modules": sorted(layers)}
    assert weights.keys() == {f"{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"}


@pytest.mark.parametrize("alpha", [7.0, 3.0, None])
def test_a_kohya_file_of_every_layer_loads_with_its_alpha(tmp_path, alpha):
    unet = lora_unet(list(layers_of(tiny_unet())), rank=3, alpha=3 if alpha is None else alpha)
    save_file(kohya_tensors(unet, alpha), tmp_path / "kohya.safetensors")
    config = read_lora_config(tmp_path / "kohya.safetensors")
    assert config == {"rank": 3, "alpha": alpha or 3, "target_modules": sorted(layers_of(tiny_unet()))}
    other = lora_unet(config["target_modules"], config["rank"], config["alpha"], trained=False)
    load_lora(other, tmp_path / "kohya.safetensors")
    assert torch.equal(predict(other), predict(unet))


def mixed_alphas(tensors):
    tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.alpha"] = torch.tensor(1.0)


def one_alpha_left_out(tensors):
    del tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.alpha"]


def mixed_ranks(tensors):
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
    tensors[f"{layer}.lora_down.weight"] = tensors[f"{layer}.lora_down.weight"][:2].clone()
    tensors[f"{layer}.lora_up.weight"] = tensors[f"{layer}.lora_up.weight"][:, :2].clone()


def ranks_that_do_not_meet(tensors):
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
    tensors[f"{layer}.lora_up.weight"] = tensors[f"{layer}.lora_up.weight"][:, :2].clone()


def no_up(tensors):
    del tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.lora_up.weight"]


def text_encoder(tensors):
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors |= {f"{layer}.lora_down.weight": torch.ones(3, 4), f"{layer}.lora_up.weight": torch.ones(4, 3)}


def text_encoder_alone(tensors):
    tensors.clear()
    text_encoder(tensors)


def dora(tensors):
    tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.dora_scale"] = torch.ones(16, 1)


def another_network(tensors):
    tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.hada_w1_a"] = torch.ones(16, 3)


def original_names(tensors):
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors |= {f"{layer}.lora_down.weight": torch.ones(3, 4), f"{layer}.lora_up.weight": torch.ones(4, 3)}


def alpha_of_several_numbers(tensors):
    tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.alpha"] = torch.ones(2)


def alpha_of_no_layer(tensors):
    tensors["lora_unet_conv_in.alpha"] = torch.tensor(7.0)


REFUSED = [
    (mixed_alphas, r"one rank and one alpha for all layers, found ranks \[3\], alphas \[1.0, 7.0\]"),
    (one_alpha_left_out, r"one rank and one alpha for all layers, found ranks \[3\], alphas \[3.0, 7.0\]"),
    (mixed_ranks, r"one rank and one alpha for all layers, found ranks \[2, 3\]"),
    (ranks_that_do_not_meet, r"one rank and one alpha for all layers, found ranks \[2, 3\]"),
    (no_up, "every layer.*: mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora_B.weight"),
    (text_encoder, "lora_unet_. layers alone.*, found lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
    (text_encoder_alone, "expected only tensors named unet.*, found text_encoder"),
    (dora, "found lora_unet_mid_block.*dora_scale"),
    (another_network, "found lora_unet_mid_block.*hada_w1_a"),
    (original_names, "diffusers' names.*, found lora_unet_input_blocks_4_1"),
    (alpha_of_several_numbers, "found lora_unet_mid_block.*alpha"),
    (alpha_of_no_layer, "every layer.*: conv_in.lora_A.weight"),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_would_be_read_wrongly_is_refused_with_its_reason(tmp_path, change, message):
    tensors = kohya_tensors(lora_unet(ATTENTION), 7.0)
    change(tensors)
    save_file(tensors, tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        read_lora_config(tmp_path / "kohya.safetensors")
    assert "\n" not in str(error.value) and "kohya.safetensors" in str(error.value)


def test_a_file_of_diffusers_that_lacks_a_matrix_is_refused(tmp_path):
    tensors = load_file(save_lora(lora_unet(ATTENTION), tmp_path))
    del tensors["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight"]
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight"):
        read_lora_config(tmp_path / "half.safetensors")


def test_what_is_written_without_a_unet_equals_what_is_saved_with_it(tmp_path):
    unet = lora_unet(ATTENTION)
    weights, config = read_lora(save_lora(unet, tmp_path))
    lora_config = LoraConfig(r=config["rank"], lora_alpha=config["alpha"], target_modules=config["target_modules"])
    path = write_lora(weights, lora_config, tmp_path / "copy.safetensors")
    assert {file.name for file in tmp_path.iterdir()} == {"pytorch_lora_weights.safetensors", "copy.safetensors"}
    assert read_lora_config(path) == config == {"rank": 3, "alpha": 7, "target_modules": sorted(ATTENTION)}
    expected = get_peft_model_state_dict(unet)
    copy, _ = read_lora(path)
    assert copy.keys() == expected.keys() and all(torch.equal(copy[name], expected[name]) for name in expected)


# --- target modules


@pytest.mark.parametrize("unet, targets", [(tiny_unet, ATTENTION + CONVOLUTIONS), (tiny_unet2d, ["to_q", "conv1"])])
def test_names_that_match_a_layer_are_taken(unet, targets):
    check_target_modules(unet(), targets)
    check_target_modules(unet(), ["mid_block.attentions.0.to_q" if unet is tiny_unet2d else "attn1.to_q"])


@pytest.mark.parametrize(
    "targets, message",
    [
        (["to_q", "to_kk", "to_v"], "found: 'to_kk' matches nothing, did you mean 'to_k'?."),
        (["to_k", "ff.net.0.prj"], "found: 'ff.net.0.prj' matches nothing, did you mean 'ff.net.0.proj'?."),
        (["conv1", "zzz", "conv3"], "found: 'zzz' matches nothing; 'conv3' matches nothing, did you mean 'conv'?."),
        (["to_q", ""], "found: '' matches nothing."),
        (["o_q"], "found: 'o_q' matches nothing, did you mean 'to_q'?."),  # the end of a name, but no part of it
        (
            ["to_q", "to_out"],
            "found: 'to_out' matches down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out (ModuleList), did you "
            "mean 'to_out.0'?.",
        ),
        (["norm1"], "found: 'norm1' matches down_blocks.0.resnets.0.norm1 (GroupNorm)."),
        (["0"], "found: '0' matches down_blocks.0 (DownBlock2D)."),
    ],
)
def test_names_that_match_no_layer_are_refused_with_what_they_may_have_meant(targets, message):
    with pytest.raises(ValueError) as error:
        check_target_modules(tiny_unet(), targets)
    assert str(error.value) == f"--lora_target_modules: expected names of layers that take a LoRA, {message}"


@pytest.mark.parametrize("target", [*ATTENTION, *CONVOLUTIONS, "to_out", "norm1", "0", "q", "attn1", "proj", "net.2"])
def test_what_is_taken_is_what_peft_takes(target):
    """peft itself says which names it can use: it raises for one that matches nothing or something else."""
    unet = tiny_unet()
    try:
        check_target_modules(unet, [target])
    except ValueError:
        with pytest.raises(ValueError, match="Target module|No modules were targeted"):
            unet.add_adapter(LoraConfig(target_modules=[target]))
    else:
        unet.add_adapter(LoraConfig(target_modules=[target]))


# --- options beside --lora_path


SAVED = {"rank": 3, "alpha": 7, "target_modules": sorted(ATTENTION)}


def test_options_that_agree_with_the_file_are_taken():
    check_lora_options(tiny_unet(), SAVED)
    check_lora_options(tiny_unet(), SAVED, rank=3, lora_alpha=7.0, target_modules=["to_q", "to_v", "to_k", "to_out.0"])


def test_target_modules_agree_if_they_name_the_same_layers():
    """A kohya file lists its layers by full name, and peft takes a string for an expression."""
    layers = [name for name in layers_of(tiny_unet()) if name.endswith((".to_q", ".to_k"))]
    for saved in (layers, r".*\.to_[qk]"):
        check_lora_options(tiny_unet(), SAVED | {"target_modules": saved}, target_modules=["to_k", "to_q"])
    with pytest.raises(ValueError, match=f"has {len(layers) - 1} layers.*names {len(layers)}.*only: {layers[0]}"):
        check_lora_options(tiny_unet(), SAVED | {"target_modules": layers[1:]}, target_modules=["to_k", "to_q"])


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rank": 4}, "--lora_path has --rank 3, found --rank 4"),
        ({"rank": 3, "lora_alpha": 3}, "--lora_path has --lora_alpha 7, found --lora_alpha 3"),
        ({"target_modules": ["to_q", "to_k"]}, "--lora_path has 32 layers, --lora_target_modules to_q,to_k names 16"),
        ({"target_modules": [*ATTENTION, "conv1"]}, "only: down_blocks.0.resnets.0.conv1"),
    ],
)
def test_options_that_disagree_are_refused_with_both_values(given, message):
    with pytest.raises(ValueError, match=message) as error:
        check_lora_options(tiny_unet(), SAVED, **given)
    assert "\n" not in str(error.value)
