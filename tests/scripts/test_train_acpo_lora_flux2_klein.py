"""The FLUX.2-klein script on tiny models: what its step is told, what it writes, that it repeats itself, what it refuses.

What it has in common with train_acpo_lora_sd3.py, all but the family, is tested there; the last test says that it is the same.
"""

import contextlib
import json
import logging
import shutil
from argparse import Namespace

import pytest
import torch
from accelerate.utils import compare_versions
from peft import LoraConfig
from safetensors.torch import load_file

from acpo_utils.evaluators import load_evaluator
from acpo_utils.families.chat import ChatTokenizer
from acpo_utils.lora import LORA_NAME, load_lora
from acpo_utils.randomness import step_generator
from acpo_utils.training import memory_estimate
from acpo_utils.training.step_cost import StepCost
from tests.launching import EXAMPLES, command_line, launch, refused, run_script
from tests.scripts.test_train_acpo_lora_sd3 import FLOW_DEFAULTS
from tests.tiny_models import save_tiny_klein, tiny_klein, tiny_klein_vae
from tests.training.test_memory_estimate import bytes_kept


pytest.importorskip("diffusers", minversion="0.37")
import train_acpo_lora_flux2_klein as script  # noqa: E402
from diffusers import Flux2KleinPipeline  # noqa: E402

from acpo_utils.families import flux2_klein  # noqa: E402


SCRIPT, SD3_SCRIPT = EXAMPLES / "train_acpo_lora_flux2_klein.py", EXAMPLES / "train_acpo_lora_sd3.py"
DEFAULTS = FLOW_DEFAULTS | {"weighting_scheme": "none", "guidance_scale": 4.0}


@pytest.fixture
def flags(tiny_klein_pipeline, tiny_guide, captioned_images, tmp_path, no_estimate):
    """The command line of a training of three steps, with changes; None leaves a flag out."""

    def build(output: str = "out", **changes) -> list[str]:
        options = {
            "pretrained_model_name_or_path": tiny_klein_pipeline,
            "evaluator": f"ipce:{tiny_guide}",
            "train_data_dir": captioned_images,
            "resolution": 32,
            "max_sequence_length": 32,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "max_train_steps": 3,
            "report_to": "none",
            "output_dir": tmp_path / output,
        }
        return command_line(**(options | changes))

    return build


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red wall\na blue wall\n")
    return tmp_path / "prompts.txt"


@pytest.fixture
def world(tiny_guide):
    pipeline = tiny_klein()
    text_encoders = torch.nn.ModuleList([pipeline.text_encoder])
    for model in (pipeline.transformer, pipeline.vae, text_encoders):
        model.requires_grad_(False)
    torch.manual_seed(0)
    targets = flux2_klein.targets(pipeline.transformer).split(",")
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    tokenizers = [ChatTokenizer(pipeline.tokenizer, 32, enable_thinking=False)]
    guide, texts = load_evaluator(f"ipce:{tiny_guide}"), ["a red wall", "a blue wall"]
    batch = script.data.token_ids(tokenizers, texts) | {
        "pixel_values": torch.rand(2, 3, 32, 32, generator=step_generator(0)) * 2 - 1,
        "negative_conditions": flux2_klein.encode_prompts(script.data.token_ids(tokenizers, [""]), text_encoders),
        "prompts": texts,
    }
    models = (pipeline.transformer, pipeline.vae, pipeline.vae, text_encoders)

    def step(**changes):
        args = Namespace(**(DEFAULTS | changes))
        generator = step_generator(0, 0)
        return script.training_step(batch, *models, guide, pipeline.scheduler, generator, args.anchor_weight, args)

    return Namespace(step=step, models=models, pipeline=pipeline, batch=batch, guide=guide)


CHANGES = {
    "data": {},
    "rollout": {"late_start": "rollout", "tmax": 700},
    "guided": {"scored_guidance": True, "late_steps": 2},
    "crop": {"decode": "crop", "decode_size": 16, "diffusion_timesteps": "late"},
}


@pytest.mark.parametrize("case", CHANGES)
def test_which_clock_and_prompt_the_transformer_is_told_and_what_is_scored(world, monkeypatch, case):
    """Sigma, not 1000 sigma; late ones below 0.25; guided passes have no prompt."""
    clock, told, sizes, forward = [], [], [], world.pipeline.transformer.forward

    def noting(*args, timestep, encoder_hidden_states, guidance, **kwargs):
        assert guidance is None
        clock.append(timestep)
        told.append(torch.equal(encoder_hidden_states[0], world.batch["negative_conditions"]["prompt_embeds"][0]))
        return forward(*args, timestep=timestep, encoder_hidden_states=encoder_hidden_states, **kwargs)

    score = world.guide.score
    monkeypatch.setattr(world.pipeline.transformer, "forward", noting)
    monkeypatch.setattr(
        world.guide, "score", lambda images, prompts: sizes.append(images.shape) or score(images, prompts)
    )
    loss, terms = world.step(**CHANGES[case])
    loss.backward()
    assert terms["loss_anchor"] == 0 and (terms["late_timesteps"] < CHANGES[case].get("tmax", 250)).all()
    assert sizes == [(2, 3, 16, 16) if case == "crop" else (2, 3, 32, 32)]
    for name, parameter in world.pipeline.transformer.named_parameters():
        assert ("lora_B" not in name) or parameter.grad.abs().sum() > 0, name
    *late, last = clock
    if case == "data":
        assert len(late) == 2 and torch.equal(*late) and (late[0] < 0.25).all() and not any(told)
    elif case == "rollout":  # with guidance down to the window, then base and LoRA
        sampled = flux2_klein.schedule(world.pipeline.scheduler, (2, 32, 8, 8), DEFAULTS["num_inference_steps"])
        before = int((1000 * sampled >= 700).sum())
        assert [sigmas[0].item() for sigmas in clock[: 2 * before : 2]] == pytest.approx(sampled[:before].tolist())
        assert told == [False, True] * before + [False] * 3
    elif case == "guided":  # anchor, prompt, no prompt; then half way to 0, with and without; L_diff
        assert told == [False, False, True, False, True, False]
        torch.testing.assert_close(late[3], late[0] / 2)
    else:  # L_diff shares the late pass
        assert len(clock) == 2 and torch.equal(*clock)


def test_all_of_a_step_is_on_the_models_device(world, monkeypatch):
    """Which is "meta" here, that takes no tensor of another; it has no autocast, and the guide's tokens are real."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(world.guide, "score", lambda images, prompts: images.mean((1, 2, 3)).sigmoid())
    kept = flux2_klein.encode_prompts(world.batch, world.models[3]) | {"pixel_values": world.batch["pixel_values"]}
    empty = world.batch["negative_conditions"]
    world.batch |= script.data.to_device(kept, "meta") | {"negative_conditions": script.data.to_device(empty, "meta")}
    for model in world.models[:2]:
        model.to("meta")
    loss, terms = world.step(**CHANGES["rollout"])
    loss.backward()
    assert {term.device.type for term in terms.values()} == {"meta"}


def test_the_estimate_keeps_what_a_step_keeps_and_suggests_the_small_decoder(world):
    more = {"train_batch_size": 2, "mixed_precision": "no", "cache_latents": True, "seed": 0, "decode_dtype": "fp32"}
    args = Namespace(**(DEFAULTS | {"gradient_checkpointing": False} | more))
    guide_inputs = (torch.rand(2, 3, 32, 32), world.batch["prompts"])
    with torch.no_grad():
        world.guide.score(*guide_inputs)
    cost = StepCost(
        script.training_step,
        world.models,
        (world.guide, *guide_inputs),
        world.pipeline.scheduler,
        world.batch["negative_conditions"],
        torch.device("cpu"),
    )
    parts = memory_estimate.memory_parts(cost, {"guide": [world.guide]}, args)
    estimated = sum(size for part, size in parts.items() if part.startswith("kept"))
    found = bytes_kept(lambda: world.step()[0], [*world.models, world.guide])
    assert estimated == pytest.approx(found, rel=0.05)
    if compare_versions("diffusers", "<", "0.38.0"):  # whose class has no smaller decoder
        return
    tiny = Namespace(**vars(args) | {"decode": "tiny"})
    small = memory_estimate.memory_parts(cost, {"guide": [world.guide]}, tiny)
    assert small["kept: decode"] < parts["kept: decode"] and small["weights: tiny VAE"] < parts["weights: VAE"] / 2


# --- The script


@pytest.mark.parametrize("run", [run_script, pytest.param(launch, marks=pytest.mark.slow)])
def test_outputs_and_the_lora_in_the_stock_pipeline(run, flags, lora_of, prompts, tmp_path, tiny_klein_pipeline):
    """In this process and, of the slow tests, by `accelerate launch`."""
    targets = ["to_q", "to_v", "to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out", "ff.linear_in"]
    options = {"rank": 3, "lora_alpha": 6, "lora_layers": ",".join(targets), "learning_rate": 1e-2}
    options |= {"validation_steps": 2, "validation_prompt": "a red wall", "num_validation_images": 1}
    output = run(
        SCRIPT, *flags(eval_prompts=prompts, num_inference_steps=4, tmax=800, checkpointing_steps=3, **options)
    )
    assert run is not launch or ("kept: decode" in output and "No estimate of memory" not in output)
    folder = tmp_path / "out"
    made = {path.name for path in folder.iterdir()}
    assert made >= {"checkpoint-3", "comparison.png", "metrics.json", "validation", "README.md", LORA_NAME}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["comparisons"]["guide"]["n"] == 2 and metrics["sets"]["drift"][0] > 0
    assert "flux2-klein-diffusers" in (folder / "README.md").read_text()
    weights = lora_of()
    assert all(name.startswith("transformer.") and weight.abs().sum() > 0 for name, weight in weights.items())

    def picture(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 4, "height": 32, "width": 32, "max_sequence_length": 32}
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt="a red wall", generator=generator, output_type="pt", **settings).images

    base, stock, trained = (Flux2KleinPipeline.from_pretrained(tiny_klein_pipeline) for _ in range(3))
    stock.load_lora_weights(folder, weight_name=LORA_NAME)
    trained.transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    load_lora(trained.transformer, folder, pipeline_class=Flux2KleinPipeline)
    torch.testing.assert_close(picture(stock), picture(trained), atol=1e-5, rtol=0)
    assert not torch.allclose(picture(stock), picture(base), atol=1e-3)


def test_resume_equals_the_uninterrupted_run_bit_for_bit(flags, lora_of, tmp_path):
    options = {"gradient_accumulation_steps": 2, "random_flip": True, "train_batch_size": 1, "checkpointing_steps": 2}
    run_script(SCRIPT, *flags("whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run_script(SCRIPT, *flags("resumed", resume_from_checkpoint="latest", **options, guidance_scale=2))
    whole, resumed = lora_of("whole"), lora_of("resumed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len(whole) == 2 * (4 + 2 * 2)


def test_a_training_on_kept_latents_is_the_training_on_images(flags, lora_of, tmp_path):
    options = {"center_crop": True, "random_flip": True}
    run_script(SCRIPT, *flags("images", **options))
    run_script(SCRIPT, *flags("cached", cache_latents=True, **options))
    images, cached = lora_of("images"), lora_of("cached")
    assert max(weight.abs().max() for name, weight in images.items() if "lora_B" in name) > 1e-3
    assert all(torch.allclose(images[name], cached[name], atol=1e-4) for name in images)
    kept = load_file(tmp_path / "cached" / "latents" / "latents-00000.safetensors")
    assert kept["prompt_embeds 0"].shape == (1, 32, 48) and kept["moments 0"].shape == (2, 16, 16, 16)


def test_a_copy_in_an_empty_folder_runs_in_bf16_with_a_small_decoder(flags, lora_of, tmp_path, monkeypatch):
    pytest.importorskip("diffusers", minversion="0.38")
    copy = tmp_path / "copy" / "my_script.py"
    copy.parent.mkdir()
    shutil.copy(SCRIPT, copy)
    monkeypatch.chdir(copy.parent)
    tiny_klein_vae(seed=5, decoder_block_out_channels=(8, 8)).save_pretrained(tmp_path / "small")
    options = {"decode": "tiny", "tiny_vae_name_or_path": tmp_path / "small", "decode_dtype": "bf16"}
    options |= {"mixed_precision": "bf16", "gradient_checkpointing": True, "max_train_steps": 2}
    options |= {"validation_prompt": "a red wall", "validation_steps": 2, "num_validation_images": 1}
    options |= {"num_inference_steps": 4, "tmax": 800, "cache_latents": True, "center_crop": True}
    run_script(copy.name, *flags(**options))
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in lora_of().values())
    assert "name a model: --pretrained_model_name_or_path black-forest-labs/FLUX.2-klein-base-4B" in refused(copy)


def test_exact_images_with_the_gradient_through_bf16_train(flags, lora_of):
    """On top of the same steps through the whole VAE: Adam's first step is of the gradient's signs, nearly all of them alike."""
    options = {"max_train_steps": 1, "diffusion_weight": 0, "anchor_weight": 0}
    run_script(SCRIPT, *flags("full", **options))
    run_script(SCRIPT, *flags("straight", decode="straight_through", decode_dtype="bf16", **options))
    full, straight = lora_of("full"), lora_of("straight")
    steps = {name: (full[name].sign() * straight[name].sign()).mean() for name in full if "lora_B" in name}
    assert min(steps.values()) > 0.8 and all(straight[name].abs().max() > 0 for name in steps)


def test_a_distilled_model_is_warned_of_and_trains_without_l_diff_and_guidance(flags, prompts, tmp_path, caplog):
    quick = save_tiny_klein(tmp_path / "four-steps", is_distilled=True)
    with caplog.at_level(logging.WARNING):
        run_script(SCRIPT, *flags("data", pretrained_model_name_or_path=quick, max_train_steps=1))
        assert "seems to be distilled to few steps (is_distilled in its model_index.json)" in caplog.text
        caplog.clear()
        options = {"train_prompts": prompts, "train_data_dir": None, "late_start": "rollout", "diffusion_weight": 0}
        options |= {"num_inference_steps": 4, "tmax": 800, "eval_prompts": prompts, "max_train_steps": 1}
        run_script(SCRIPT, *flags("prompts", pretrained_model_name_or_path=quick, **options))
        assert "distilled" not in caplog.text
    assert "| `guidance_scale` | 1.0 |" in (tmp_path / "prompts" / "README.md").read_text()


def test_bad_input_is_one_line_that_names_it(flags, tiny_pipeline, tiny_flux_pipeline, tiny_klein_pipeline):
    line = refused(SCRIPT, *flags(pretrained_model_name_or_path=tiny_flux_pipeline))
    assert "it is a FluxPipeline, for train_acpo_lora_flux.py." in line
    for name in ("sdxl", "flux"):  # of the others tests/families
        words = flags(max_sequence_length=32 if name == "flux" else None)
        line = refused(EXAMPLES / f"train_acpo_lora_{name}.py", *words)
        assert "it is a Flux2KleinPipeline, for train_acpo_lora_flux2_klein.py." in line
    line = refused(SCRIPT, *flags(num_inference_steps=4, tmax=20))
    assert "none below --tmax 20 / 1000: take at least" in line
    assert "--resolution must be a multiple of 4 for this model" in refused(SCRIPT, *flags(resolution=34))
    line = refused(SCRIPT, *flags(decode="crop", decode_size=14))
    assert "--decode_size must be a multiple of 4 up to the resolution, got 14" in line
    line = refused(SCRIPT, *flags(decode="tiny", tiny_vae_name_or_path=tiny_pipeline))
    assert "expected an AutoencoderKLFlux2" in line and "FLUX.2-small-decoder" in line


def test_its_step_is_that_of_stable_diffusion_3_but_for_the_names():
    steps = []
    for path in (SD3_SCRIPT, SCRIPT):
        source = path.read_text()
        step = source[source.index("def training_step(") :]
        end = step.index("\n\n\n", step.index("def sample_late_latents("))
        steps.append(step[:end])  # with guidance and rollout
    sd3, klein = steps
    assert sd3.replace("sd3.", "flux2_klein.").replace("(B, 16, h, w)", "(B, 128, h, w)") == klein
