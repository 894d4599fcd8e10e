"""A quantised base: what is refused, how large it is, and that it trains as the one in full precision does.

diffusers quantises on a GPU alone. bitsandbytes has kernels for the CPU too, so that what diffusers checks is left out here.
"""

import json
import shutil

import pytest
import torch
import train_acpo_lora_sd3 as script
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from acpo_utils.anchor import base_prediction
from acpo_utils.families import flux, flux2_klein, quantization, sd3, z_image
from acpo_utils.families.quantization import check_quantization, frozen_bytes, read_quantization_config
from acpo_utils.lora import LORA_NAME
from acpo_utils.randomness import step_generator
from tests.launching import EXAMPLES, command_line, refused, run_script


NF4 = EXAMPLES / "accelerate_configs" / "bnb_nf4.json"
FAMILIES = {
    "sd3": (sd3, "to_q,to_k,to_v", (2, 16, 4, 4)),
    "flux": (flux, "to_q,to_k,to_v", (2, 16, 4, 4)),
    "z_image": (z_image, "to_q,to_k,to_v", (2, 16, 4, 4)),
    "klein": (flux2_klein, "to_q,to_k,to_v,to_qkv_mlp_proj", None),
}


@pytest.fixture
def on_cpu(monkeypatch):
    """diffusers takes the CPU for a GPU."""
    pytest.importorskip("bitsandbytes")
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    monkeypatch.setattr(quantization, "gpu_is_there", lambda: True)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda self, **_: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    # Some CPUs' weights are packed anew at the first pass without a gradient, and have no gradient from there on.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "bnb.json").write_text(text if isinstance(text, str) else json.dumps(text))
        return tmp_path / "bnb.json"

    return write


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "expected a JSON file, .*bnb.json cannot be read: Expecting"),
        ([4], "expected an object of BitsAndBytesConfig's keywords, found list"),
        ({"load_in_4bits": True}, "expected an object of BitsAndBytesConfig's keywords, found load_in_4bits"),
        ({"bnb_4bit_quant_type": "nf4"}, "to be true, found False and False"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "to be true, found True and True"),
        ({"load_in_4bit": "yes"}, "to be true, found yes and False"),
    ],
)
def test_a_file_that_says_nothing_of_use_is_refused(write, content, message):
    with pytest.raises(ValueError, match=f"^--bnb_quantization_config_path.*{message}"):
        check_quantization(write(content))


def test_what_is_missing_is_said_before_anything_is_loaded(monkeypatch, tmp_path, write):
    flags = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "x", "--evaluator", "x"]
    flags.append("--bnb_quantization_config_path")
    line = refused(EXAMPLES / "train_acpo_lora_sd3.py", *flags, tmp_path / "none.json")
    assert "expected a JSON file" in line and "none.json cannot be read" in line
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs bitsandbytes: pip install bitsandbytes$"):
        script.parse_args([*flags, str(NF4)])
    monkeypatch.setattr(quantization, "find_spec", lambda name: name)
    monkeypatch.setattr(quantization, "gpu_is_there", lambda: False)
    assert "needs a GPU, and none was found" in refused(EXAMPLES / "train_acpo_lora_sd3.py", *flags, NF4)
    monkeypatch.setattr(quantization, "gpu_is_there", lambda: True)
    with pytest.raises(ValueError, match="^--bnb_quantization_config_path .*bnb_4bit_quant_storage"):
        check_quantization(write({"load_in_4bit": True, "bnb_4bit_quant_storage": "nothing"}))


def load(family, folder, path):
    """The transformer with a LoRA that has moved, `predict` of it, and its arguments."""
    module, targets, shape = FAMILIES[family]
    _, tokenizers, text_encoders, vae, transformer, *_ = module.load(
        folder, None, None, torch.float32, "cpu", 24, path
    )
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets.split(",")))
    generator = step_generator(0)
    latents = torch.randn(shape or (2, 4 * vae.config.latent_channels, 4, 4), generator=generator)
    batch = script.data.token_ids(tokenizers, ["a red wall", "a blue wall"])
    conditions = module.encode_prompts(batch, text_encoders)
    if family == "flux":
        conditions = flux.with_guidance(conditions, 3.5)
    return transformer, module.predict, (latents, torch.tensor([0.1, 0.2]), conditions)


def gradients(transformer, predict, inputs):
    predict(transformer, *inputs).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_4_bit_base_has_the_gradients_of_the_whole_one_about(family, on_cpu, request):
    folder = request.getfixturevalue(f"tiny_{family}_pipeline")
    whole, predict, inputs = load(family, folder, None)
    quantized, _, _ = load(family, folder, NF4)
    assert any(hasattr(parameter, "quant_state") for parameter in quantized.parameters())
    trained = [p for p in quantized.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    # A new LoRA changes nothing: the base with it and without it is the same, and near the whole one.
    with torch.no_grad():
        base = base_prediction(quantized, *inputs, predict=predict)
        assert torch.equal(predict(quantized, *inputs), base)
        expected = predict(whole, *inputs)
    assert 0 < (base - expected).norm() < 0.3 * expected.norm()
    found, expected = (gradients(model, predict, inputs) for model in (quantized, whole))
    assert torch.cosine_similarity(found, expected, dim=0) > 0.9
    # What the estimate counts is what is there, but for blocks that are not full.
    config = read_quantization_config(NF4)
    there = 0
    for parameter in quantized.parameters():
        if not parameter.requires_grad:
            there += parameter.nbytes
            state = getattr(parameter, "quant_state", None)
            there += state.absmax.nbytes + state.state2.absmax.nbytes if state else 0
    assert frozen_bytes(whole, config, 4) == pytest.approx(there, rel=0.01)
    twin = quantization.in_full_precision(quantized)
    assert frozen_bytes(twin, quantization.loaded_quantization(quantized), 4) == frozen_bytes(whole, config, 4)


def test_layers_that_are_named_stay_whole(on_cpu, tiny_sd3_pipeline, write):
    config = {"load_in_4bit": True, "llm_int8_skip_modules": ["proj_out", "to_q", "transformer_blocks.1"]}
    transformer, *_ = load("sd3", tiny_sd3_pipeline, write(config))
    whole, *_ = load("sd3", tiny_sd3_pipeline, None)
    packed = sum(hasattr(parameter, "quant_state") for parameter in transformer.parameters())
    layers = quantization.quantized_layers(whole, config)
    assert 0 < len(layers) == packed < len(quantization.quantized_layers(whole, {"load_in_4bit": True}))
    skipped = {
        whole.proj_out,
        whole.transformer_blocks[0].attn.to_q.base_layer,
        *whole.transformer_blocks[1].modules(),
    }
    assert not {*layers} & skipped
    once, twice = (frozen_bytes(whole, config | {"bnb_4bit_use_double_quant": on}, 4) for on in (False, True))
    weights = sum(layer.weight.numel() for layer in layers)
    assert once - twice == pytest.approx(weights / 64 * (4 - 1 - 4 / 256))
    assert quantization.largest_layer(whole, config) == max(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize("change, found", [("missing", "some are missing"), ("unexpected", "1 unexpected tensors")])
def test_a_4_bit_base_is_read_strictly_too(on_cpu, tiny_sd3_pipeline, tmp_path, change, found):
    shutil.copytree(tiny_sd3_pipeline, tmp_path / "damaged")
    (file,) = (tmp_path / "damaged" / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weight = weights.pop("transformer_blocks.0.attn.to_k.weight")
    if change == "unexpected":
        weights |= {"transformer_blocks.0.attn.to_k.weight": weight, "another.weight": weight.clone()}
    save_file(weights, file)
    with pytest.raises(ValueError, match=f"the weights in .*transformer do not fit its config.json: {found}"):
        load("sd3", tmp_path / "damaged", NF4)


def test_the_script_trains_over_a_4_bit_base(on_cpu, tiny_sd3_pipeline, tiny_guide, captioned_images, tmp_path):
    """With the estimate, a checkpoint to go on from, and a LoRA that the stock pipeline reads."""
    options = {
        "pretrained_model_name_or_path": tiny_sd3_pipeline,
        "bnb_quantization_config_path": NF4,
        "evaluator": f"ipce:{tiny_guide}",
        "train_data_dir": captioned_images,
        "resolution": 32,
        "max_sequence_length": 24,
        "gradient_checkpointing": True,
        "mixed_precision": "bf16",
        "learning_rate": 1e-3,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "report_to": "none",
        "output_dir": tmp_path,
    }
    output = run_script(EXAMPLES / "train_acpo_lora_sd3.py", *command_line(**options))
    assert "Memory, estimated for batch 1" in output and "No estimate" not in output
    more = {"resume_from_checkpoint": "checkpoint-1", "max_train_steps": 3, "output_dir": tmp_path}
    run_script(EXAMPLES / "train_acpo_lora_sd3.py", *command_line(**options | more))
    _, _, inputs = load("sd3", tiny_sd3_pipeline, None)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_pipeline)
    plain = sd3.predict(pipeline.transformer, *inputs)
    pipeline.load_lora_weights(tmp_path)
    assert not torch.equal(sd3.predict(pipeline.transformer, *inputs), plain)
    # It goes into one over a quantised base, whose weights have other shapes, as --lora_path has it.
    again = {"lora_path": tmp_path, "output_dir": tmp_path / "again", "learning_rate": 0}
    run_script(EXAMPLES / "train_acpo_lora_sd3.py", *command_line(**options | again | {"max_train_steps": 1}))
    first, second = (load_file(folder / LORA_NAME) for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
