"""examples/convert_lora.py: the same picture from either file, alpha and convolutions kept, and nothing half written."""

import json

import convert_lora as script
import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from acpo_utils.evaluation.models import class_of
from acpo_utils.families import flux, sd3, z_image
from acpo_utils.families.loading import denoiser
from acpo_utils.lora import LORA_NAME, load_lora, read_lora, read_lora_config, save_lora
from tests.launching import EXAMPLES, refused, run_script
from tests.tiny_models import tiny_sd3_transformer, tiny_unet


SCRIPT = EXAMPLES / "convert_lora.py"
DEMO = EXAMPLES / "demo"
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
DEMO_TARGETS = json.loads((DEMO / "acpo_lora_sd.json").read_text())["lora_target_modules"].split(",")
# What every version of diffusers reads of kohya's names; and all, which it reads from 0.39 on: before, some are left out.
MOST = [
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "time_emb_proj",
]
MOST += ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
ALL = [*MOST, "conv_in", "conv_out", "linear_1", "linear_2"]
diffusers_reads_all = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 39)
since_0_39 = pytest.mark.skipif(not diffusers_reads_all, reason="diffusers leaves conv_in, conv_out out before 0.39")


def adapted(unet, targets, rank=3, alpha=7.0, std=0.1):
    """The U-Net with a LoRA that does something: alpha is not the rank, and lora_B not zero."""
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return unet


def convert(source, target, *flags):
    script.main(script.parse_args(["--lora_path", str(source), "--output_path", str(target), *flags]))
    return target


def load_tiny(pipeline_folder):
    unchecked = {"safety_checker": None} if class_of(str(pipeline_folder)) == "StableDiffusionPipeline" else {}
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder, **unchecked).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline_folder, lora=None, size=32):
    pipeline = load_tiny(pipeline_folder)
    if lora is not None:  # by folder and name: offline, older diffusers take no file's path
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    generator = torch.Generator().manual_seed(2)
    return pipeline(
        prompt="a red wall",
        height=size,
        width=size,
        num_inference_steps=2,
        generator=generator,
        output_type="np",
    ).images[0]


# --- the picture


def same_pictures(pipeline_folder, unet, tmp_path, size=32):
    """diffusers draws the same from our file, from kohya's made of it, and from ours made of that again."""
    ours = save_lora(unet, tmp_path)
    kohya = convert(ours, tmp_path / "kohya.safetensors")
    back = convert(kohya, tmp_path / "back.safetensors", "--to", "diffusers")
    expected = picture(pipeline_folder, ours, size)
    assert np.abs(expected - picture(pipeline_folder, size=size)).max() > 0.02, "the LoRA does nothing"
    assert np.array_equal(picture(pipeline_folder, kohya, size), expected)
    assert np.array_equal(picture(pipeline_folder, back, size), expected)


@pytest.mark.parametrize("targets", [ATTENTION, MOST, pytest.param(ALL, marks=since_0_39)], ids=len)
def test_either_file_gives_the_same_picture(tiny_pipeline, tmp_path, targets):
    unet = adapted(tiny_unet(), targets)
    assert read_lora_config(save_lora(unet, tmp_path))["target_modules"] == sorted(targets)
    same_pictures(tiny_pipeline, unet, tmp_path)


@since_0_39
def test_either_file_gives_the_same_picture_of_the_demo(tmp_path):
    unet = UNet2DConditionModel.from_pretrained(DEMO / "pipeline", subfolder="unet")
    same_pictures(DEMO / "pipeline", adapted(unet, DEMO_TARGETS, rank=8, alpha=5.0), tmp_path, size=64)


def test_either_file_gives_the_same_picture_of_sdxl(tiny_sdxl_pipeline, tmp_path):
    same_pictures(tiny_sdxl_pipeline, adapted(load_tiny(tiny_sdxl_pipeline).unet, ATTENTION), tmp_path)


def targets_of(family, transformer):
    """The default of the family's script."""
    if family == "klein":
        from acpo_utils.families import flux2_klein

        return flux2_klein.targets(transformer).split(",")
    return {"sd3": sd3, "flux": flux, "z_image": z_image}[family].TARGETS.split(",")


@pytest.mark.parametrize("family", ["sd3", "flux", "z_image", "klein"])
def test_a_transformers_file_gives_the_same_picture_with_alpha_in_its_weights(family, request, tmp_path):
    """Alpha is twice the rank: a factor of two leaves every bit of a product as it is, so that the pictures are equal."""
    folder = request.getfixturevalue(f"tiny_{family}_pipeline")
    pipeline = load_tiny(folder)
    transformer = denoiser(pipeline)
    ours = save_lora(
        adapted(transformer, targets_of(family, transformer), alpha=6.0, std=0.5), tmp_path, type(pipeline)
    )
    converted = convert(ours, tmp_path / "converted.safetensors")
    expected = picture(folder, ours)
    assert np.abs(expected - picture(folder)).max() > 0.02, "the LoRA does nothing"
    assert np.array_equal(picture(folder, converted), expected)

    # Whoever reads the weights alone, and takes alpha to be the rank, finds the same in them; --lora_path does, too.
    with safe_open(converted, framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 3
    weights, config = read_lora(converted, type(pipeline))
    before = read_lora(ours, type(pipeline))[0]
    assert config == read_lora_config(ours, type(pipeline)) | {"alpha": 3} and weights.keys() == before.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, before[name] * (2 if name.endswith("lora_B.weight") else 1))


def test_our_own_scripts_read_every_layer_back(tmp_path):
    """Whatever diffusers' version: its reader of kohya's names is not asked."""
    unet = adapted(tiny_unet(), ALL)
    ours = save_lora(unet, tmp_path)
    kohya = convert(tmp_path, tmp_path / "kohya.safetensors")
    config = read_lora_config(kohya)
    assert (config["rank"], config["alpha"]) == (3, 7.0)
    other = tiny_unet()
    other.add_adapter(LoraConfig(r=3, lora_alpha=7.0, target_modules=config["target_modules"]))
    load_lora(other, kohya)
    weights, again = read_lora(ours)[0], read_lora(save_lora(other, tmp_path / "again"))[0]
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)


def test_weights_merged_as_other_programs_merge_them_predict_the_same(tmp_path):
    """ComfyUI, A1111 and Forge add alpha / rank * up @ down to each layer that the name says, kernels flattened."""
    unet = adapted(tiny_unet(), ALL)
    tensors = load_file(convert(save_lora(unet, tmp_path), tmp_path / "kohya.safetensors"))
    merged = tiny_unet()
    modules = {"lora_unet_" + name.replace(".", "_"): module for name, module in merged.named_modules()}
    layers = {name.split(".")[0] for name in tensors}
    assert len(tensors) == 3 * len(layers) and len(layers) > 60
    with torch.no_grad():
        for layer in layers:
            up, down = tensors[f"{layer}.lora_up.weight"], tensors[f"{layer}.lora_down.weight"]
            change = tensors[f"{layer}.alpha"].item() / len(down) * up.flatten(1) @ down.flatten(1)
            weight = modules[layer].weight
            weight += change.reshape(weight.shape)
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(2, 4, 8, 8, generator=generator), 5, torch.randn(2, 5, 32, generator=generator)
        expected, base = unet(*inputs).sample, tiny_unet()(*inputs).sample
        assert (expected - base).abs().max() > 0.1
        torch.testing.assert_close(merged(*inputs).sample, expected, atol=1e-4, rtol=1e-3)


def test_a_transformer_merged_as_comfyui_merges_it_predicts_the_same(tmp_path):
    """lora_B @ lora_A of each layer, since there is no alpha beside it in the file."""
    targets = sd3.TARGETS.split(",")
    transformer = adapted(tiny_sd3_transformer(), targets, std=0.3)
    ours = save_lora(transformer, tmp_path, diffusers.StableDiffusion3Pipeline)
    tensors = load_file(convert(ours, tmp_path / "converted.safetensors"))
    assert {name.rsplit(".", 2)[1] for name in tensors} == {"lora_A", "lora_B"}
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "hidden_states": torch.randn(1, 16, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 64, generator=generator),
        "pooled_projections": torch.randn(1, 40, generator=generator),
        "timestep": torch.tensor([300.0]),
    }
    expected, base = transformer(**inputs).sample, tiny_sd3_transformer()(**inputs).sample
    assert (expected - base).abs().max() > 0.1
    for file, is_equal in ((load_file(ours), False), (tensors, True)):  # alpha / rank of the first is not read
        merged: SD3Transformer2DModel = tiny_sd3_transformer()
        with torch.no_grad():
            for name, down in file.items():
                if name.endswith(".lora_A.weight"):
                    layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
                    merged.get_submodule(layer).weight += file[name.replace("lora_A", "lora_B")] @ down
            found = merged(**inputs).sample
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-3) == is_equal


# --- the file


def test_names_shapes_and_metadata_are_kohyas(tmp_path):
    kohya = convert(save_lora(adapted(tiny_unet(), ["to_k", "conv1"]), tmp_path), tmp_path / "kohya.safetensors")
    tensors = load_file(kohya)
    attention, convolution = (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_down_blocks_0_resnets_0_conv1",
    )
    assert tensors[f"{attention}.lora_down.weight"].shape == (3, 32)
    assert tensors[f"{attention}.lora_up.weight"].shape == (16, 3)
    assert tensors[f"{convolution}.lora_down.weight"].shape == (3, 8, 3, 3)
    assert tensors[f"{convolution}.lora_up.weight"].shape == (8, 3, 1, 1)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensors[name].item() == 7.0 for name in tensors if name.endswith(".alpha"))
    with safe_open(kohya, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata.pop("ss_network_args")) == {"conv_dim": "3", "conv_alpha": "7.0"}
    assert metadata == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "3",
        "ss_network_alpha": "7.0",
    }


@pytest.mark.parametrize(
    "width, expected",
    [
        (768, {"ss_v2": "False", "ss_base_model_version": "sd_v1"}),
        (1024, {"ss_v2": "True"}),
        (2048, {"ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0"}),
        (320, {}),  # no Stable Diffusion that was published
    ],
)
def test_the_base_model_is_told_by_the_width_of_its_text(width, expected):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.{}.to_k.lora_{}.weight"
    weights = {layer.format("attn1", "A"): torch.ones(2, 320), layer.format("attn2", "A"): torch.ones(2, width)}
    metadata = script.kohya_metadata(weights, {"rank": 2, "alpha": 1})
    expected = expected | {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "1.0"}
    assert metadata == expected


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_fp16_halves_the_weights_and_leaves_alpha_alone(tmp_path, to):
    ours = save_lora(adapted(tiny_unet(), ATTENTION, alpha=7.3), tmp_path)
    half = convert(ours, tmp_path / "half.safetensors", "--dtype", "fp16", "--to", to)
    assert {t.dtype for name, t in load_file(half).items() if "alpha" not in name} == {torch.float16}
    weights, config = read_lora(half)
    assert config["alpha"] == pytest.approx(7.3, abs=1e-6)  # in fp16 it were 7.3008
    full = read_lora(ours)[0]
    assert weights.keys() == full.keys() and all(torch.equal(weights[name], full[name].half()) for name in full)


def test_a_number_that_fp16_cannot_hold_is_refused(tmp_path):
    unet = adapted(tiny_unet(), ATTENTION)
    next(parameter for name, parameter in unet.named_parameters() if "lora_A" in name).data[0, 0] = 1e5
    ours = save_lora(unet, tmp_path)
    with pytest.raises(ValueError, match="--dtype fp16: .*attn1.to_q.lora_A.weight .*65504: use fp32"):
        convert(ours, tmp_path / "half.safetensors", "--dtype", "fp16")
    assert [file.name for file in tmp_path.iterdir()] == [LORA_NAME]


# --- the script


def test_the_script_says_what_it_wrote_and_leaves_nothing_else(tmp_path):
    save_lora(adapted(tiny_unet(), ATTENTION), tmp_path)
    kohya = tmp_path / "made" / "kohya.safetensors"
    said = run_script(SCRIPT, "--lora_path", tmp_path, "--output_path", kohya)
    assert said == f"{kohya}: 32 layers, rank 3, alpha 7, fp32, for ComfyUI, A1111 and Forge\n"
    back = tmp_path / "made" / "back.safetensors"
    said = run_script(SCRIPT, "--lora_path", kohya, "--output_path", back, "--to", "diffusers")
    assert said == f"{back}: 32 layers, rank 3, alpha 7, fp32, for diffusers\n"
    of_transformer = adapted(tiny_sd3_transformer(), ["to_k"])
    ours = save_lora(of_transformer, tmp_path / "sd3", diffusers.StableDiffusion3Pipeline)
    out = tmp_path / "made" / "transformer.safetensors"
    said = run_script(SCRIPT, "--lora_path", ours.parent, "--output_path", out, "--dtype", "fp16")
    assert said == f"{out}: 3 layers, rank 3, alpha 3, fp16, for ComfyUI and diffusers\n"
    assert sorted(file.stem for file in (tmp_path / "made").iterdir()) == ["back", "kohya", "transformer"]


def test_what_cannot_be_converted_is_refused_in_one_line(tmp_path):
    ours = save_lora(adapted(tiny_unet(), ATTENTION), tmp_path)
    flags = ["--output_path", tmp_path / "out.safetensors", "--lora_path"]
    assert "--output_path" in refused(SCRIPT, "--lora_path", tmp_path, "--output_path", tmp_path / "lora.bin")
    assert "exists: remove it or name another" in refused(SCRIPT, "--lora_path", ours, "--output_path", ours)
    assert "not found" in refused(SCRIPT, *flags, tmp_path / "nowhere.safetensors")
    tensors = load_file(convert(ours, tmp_path / "kohya.safetensors"))
    te = {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}
    save_file(tensors | te, tmp_path / "te.safetensors")
    assert "found lora_te_text_model" in refused(SCRIPT, *flags, tmp_path / "te.safetensors")
    name = next(name for name in tensors if name.endswith(".alpha"))
    save_file(tensors | {name: torch.tensor(1.0)}, tmp_path / "mixed.safetensors")
    assert "alphas [1.0, 7.0]" in refused(SCRIPT, *flags, tmp_path / "mixed.safetensors", "--to", "diffusers")
    of_transformer = save_lora(adapted(tiny_sd3_transformer(), ["to_k"]), tmp_path / "sd3", diffusers.FluxPipeline)
    assert "--to kohya: expected a U-Net's LoRA" in refused(SCRIPT, *flags, of_transformer, "--to", "kohya")
    tensors = load_file(of_transformer)
    other = {name.replace("transformer.", "diffusion_model."): value.clone() for name, value in tensors.items()}
    save_file(other, tmp_path / "sd3" / "other.safetensors")
    assert "found diffusion_model" in refused(SCRIPT, *flags, tmp_path / "sd3" / "other.safetensors")
    save_file({**tensors, **other}, tmp_path / "sd3" / "both.safetensors")
    assert "found diffusion_model" in refused(SCRIPT, *flags, tmp_path / "sd3" / "both.safetensors")
    left = {file.name for file in tmp_path.iterdir()} - {"sd3"}
    assert left == {LORA_NAME, "kohya.safetensors", "te.safetensors", "mixed.safetensors"}


# --- what train_acpo_lora_sd.py makes of kohya's file


def test_training_continues_from_kohyas_file_as_from_ours(sd_flags, lora_of, tmp_path):
    ours = save_lora(adapted(tiny_unet(), ["to_k", "to_q", "conv1", "conv_out"], alpha=2.0), tmp_path)
    kohya = convert(ours, tmp_path / "kohya.safetensors")
    for output, path in (("from_ours", ours), ("from_kohya", kohya)):
        run_script(EXAMPLES / "train_acpo_lora_sd.py", *sd_flags(output, lora_path=path, max_train_steps=1))
    expected, found = lora_of("from_ours"), lora_of("from_kohya")
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    before = load_file(ours)
    assert 0 < max((found[name] - before[name]).abs().max() for name in found) < 2e-3, "one step of Adam from the file"
    assert read_lora_config(tmp_path / "from_kohya")["alpha"] == 2.0


def test_training_refuses_a_file_that_it_would_continue_in_part(sd_flags, tmp_path):
    tensors = load_file(convert(save_lora(adapted(tiny_unet(), ATTENTION), tmp_path), tmp_path / "kohya.safetensors"))
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    te = {f"{layer}.lora_down.weight": torch.ones(3, 32), f"{layer}.lora_up.weight": torch.ones(32, 3)}
    alpha = next(name for name in tensors if name.endswith(".alpha"))
    for changed, message in ((te, f"found {layer}"), ({alpha: torch.tensor(1.0)}, "alphas [1.0, 7.0]")):
        save_file(tensors | changed, tmp_path / "changed.safetensors")
        flags = sd_flags(lora_path=tmp_path / "changed.safetensors")
        assert message in refused(EXAMPLES / "train_acpo_lora_sd.py", *flags)
