"""The FLUX.1 script on tiny models: what it tells the transformer, what it writes, that it repeats itself, what it refuses.

What it has in common with train_acpo_lora_sd3.py, all but the lines that the last test names, is tested there.
"""

import contextlib
import json
import logging
import shutil
from argparse import Namespace

import pytest
import torch
import train_acpo_lora_flux as script
from accelerate import PartialState
from diffusers import FluxPipeline
from peft import LoraConfig

from acpo_utils.evaluators import load_evaluator
from acpo_utils.families import flux
from acpo_utils.lora import LORA_NAME, load_lora
from acpo_utils.randomness import step_generator
from acpo_utils.training import memory_estimate
from acpo_utils.training.step_cost import StepCost
from tests.launching import EXAMPLES, command_line, fresh_process, launch, refused, run_script
from tests.scripts.test_train_acpo_lora_sd3 import FLOW_DEFAULTS
from tests.tiny_models import tiny_flux
from tests.training.test_memory_estimate import bytes_kept


SCRIPT, SD3_SCRIPT = EXAMPLES / "train_acpo_lora_flux.py", EXAMPLES / "train_acpo_lora_sd3.py"
FLUX_DEFAULTS = FLOW_DEFAULTS | {"guidance_scale": 3.5, "train_guidance_scale": 1.0}


@pytest.fixture
def flags(tiny_flux_pipeline, tiny_guide, captioned_images, tmp_path, no_estimate):
    """The command line of a training of three steps, with changes; None leaves a flag out."""

    def build(output: str = "out", **changes) -> list[str]:
        options = {
            "pretrained_model_name_or_path": tiny_flux_pipeline,
            "evaluator": f"ipce:{tiny_guide}",
            "train_data_dir": captioned_images,
            "resolution": 32,
            "max_sequence_length": 24,
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
    pipeline = tiny_flux()
    text_encoders = torch.nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2])
    for model in (pipeline.transformer, pipeline.vae, text_encoders):
        model.requires_grad_(False)
    torch.manual_seed(0)
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=flux.TARGETS.split(",")))
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    tokenizers[1].model_max_length = 24
    guide, texts = load_evaluator(f"ipce:{tiny_guide}"), ["a red wall", "a blue wall"]
    batch = script.data.token_ids(tokenizers, texts) | {
        "pixel_values": torch.rand(2, 3, 32, 32, generator=step_generator(0)) * 2 - 1,
        "prompts": texts,
    }
    models = (pipeline.transformer, pipeline.vae, pipeline.vae, text_encoders)

    def step(**changes):
        args = Namespace(**(FLUX_DEFAULTS | changes))
        generator = step_generator(0, 0)
        return script.training_step(batch, *models, guide, pipeline.scheduler, generator, args.anchor_weight, args)

    return Namespace(step=step, models=models, pipeline=pipeline, batch=batch, guide=guide)


@pytest.mark.parametrize("changes", [{"late_steps": 2}, {"late_start": "rollout"}], ids=str)
def test_which_guidance_and_clock_the_transformer_is_told(world, monkeypatch, changes):
    """Sigma, not 1000 sigma; the scale of sampling in every late pass, that of the data in L_diff's."""
    told, clock, forward = [], [], world.pipeline.transformer.forward

    def noting(*args, guidance, timestep, **kwargs):
        told.append(guidance.tolist())
        clock.append(timestep)
        return forward(*args, guidance=guidance, timestep=timestep, **kwargs)

    monkeypatch.setattr(world.pipeline.transformer, "forward", noting)
    loss, terms = world.step(**changes)
    loss.backward()
    assert terms["loss_anchor"] == 0
    *late, last = told
    assert last == [1.0, 1.0] and late == [[3.5, 3.5]] * len(late)
    if "late_steps" in changes:
        assert len(late) == 3 and torch.equal(clock[0], clock[1]) and (clock[0] < 0.25).all()
        torch.testing.assert_close(clock[2], clock[0] / 2)
    else:
        sampled = flux.schedule(world.pipeline.scheduler, (2, 16, 16, 16), 5)
        before = int((1000 * sampled >= 250).sum())
        assert [sigmas[0].item() for sigmas in clock[:before]] == pytest.approx(sampled[:before].tolist())
        assert len(late) == before + 2
    grid = world.pipeline.scheduler.sigmas
    assert len(grid) == 1000 and torch.isin(clock[-1], grid).all()


@pytest.mark.parametrize("late_start", ["data", "rollout"])
def test_all_of_a_step_is_on_the_models_device(world, monkeypatch, late_start):
    """Which is "meta" here, that takes no tensor of another; it has no autocast, and the guide's tokens are real."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(world.guide, "score", lambda images, prompts: images.mean((1, 2, 3)).sigmoid())
    kept = flux.encode_prompts(world.batch, world.models[3]) | {"pixel_values": world.batch["pixel_values"]}
    world.batch |= script.data.to_device(kept, "meta")
    for model in world.models[:2]:
        model.to("meta")
    loss, terms = world.step(late_start=late_start)
    loss.backward()
    assert {term.device.type for term in terms.values()} == {"meta"}


def test_prompts_alone_train_by_samples(world):
    loss, terms = world.step(train_prompts="x.txt", late_start="rollout", diffusion_weight=0)
    loss.backward()
    assert set(terms) >= {"loss_anchor", "loss_quality", "score"} and "loss_diffusion" not in terms


def test_the_estimate_keeps_what_a_step_keeps(world):
    more = {"train_batch_size": 2, "mixed_precision": "no", "cache_latents": True, "seed": 0, "decode_dtype": "fp32"}
    args = Namespace(**(FLUX_DEFAULTS | {"gradient_checkpointing": False} | more))
    guide_inputs = (torch.rand(2, 3, 32, 32), world.batch["prompts"])
    with torch.no_grad():
        world.guide.score(*guide_inputs)
    conditions = {name: rows[:1] for name, rows in flux.encode_prompts(world.batch, world.models[3]).items()}
    cost = StepCost(
        script.training_step,
        world.models,
        (world.guide, *guide_inputs),
        world.pipeline.scheduler,
        conditions,
        torch.device("cpu"),
    )
    parts = memory_estimate.memory_parts(cost, {"guide": [world.guide]}, args)
    estimated = sum(size for part, size in parts.items() if part.startswith("kept"))
    found = bytes_kept(lambda: world.step()[0], [*world.models, world.guide])
    assert estimated == pytest.approx(found, rel=0.05)


# --- The script


@pytest.mark.parametrize("run", [run_script, pytest.param(launch, marks=pytest.mark.slow)])
def test_outputs_and_the_lora_in_the_stock_pipeline(run, flags, lora_of, prompts, tmp_path, tiny_flux_pipeline):
    """In this process and, of the slow tests, by `accelerate launch`."""
    targets = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2"]
    options = {"rank": 3, "lora_alpha": 6, "lora_layers": ",".join(targets), "learning_rate": 1e-2}
    options |= {"validation_steps": 2, "validation_prompt": "a red wall", "num_validation_images": 1}
    run(SCRIPT, *flags(eval_prompts=prompts, num_inference_steps=6, checkpointing_steps=3, **options))
    folder = tmp_path / "out"
    made = {path.name for path in folder.iterdir()}
    assert made >= {"checkpoint-3", "comparison.png", "metrics.json", "validation", "README.md", LORA_NAME}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["comparisons"]["guide"]["n"] == 2 and metrics["sets"]["drift"][0] > 0
    assert "flux-diffusers" in (folder / "README.md").read_text()
    weights = lora_of()
    assert all(name.startswith("transformer.") and weight.abs().sum() > 0 for name, weight in weights.items())

    def picture(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 4, "height": 32, "width": 32, "max_sequence_length": 24}
        generator = torch.Generator().manual_seed(0)
        return pipeline("a red wall", generator=generator, output_type="pt", **settings).images

    base, stock, trained = (FluxPipeline.from_pretrained(tiny_flux_pipeline) for _ in range(3))
    stock.load_lora_weights(folder, weight_name=LORA_NAME)
    trained.transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    load_lora(trained.transformer, folder, pipeline_class=FluxPipeline)
    torch.testing.assert_close(picture(stock), picture(trained), atol=1e-5, rtol=0)
    assert not torch.allclose(picture(stock), picture(base), atol=1e-3)


def test_resume_equals_the_uninterrupted_run_bit_for_bit(flags, lora_of, tmp_path):
    options = {"gradient_accumulation_steps": 2, "random_flip": True, "train_batch_size": 1, "checkpointing_steps": 2}
    run_script(SCRIPT, *flags("whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run_script(SCRIPT, *flags("resumed", resume_from_checkpoint="latest", **options, num_inference_steps=20))
    whole, resumed = lora_of("whole"), lora_of("resumed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    changed = flags("resumed", resume_from_checkpoint="latest", **options, guidance_scale=2)
    assert "--guidance_scale 3.5 (now 2.0)" in refused(SCRIPT, *changed), "the late passes are told it"


def test_a_training_on_kept_latents_is_the_training_on_images(flags, lora_of):
    options = {"center_crop": True, "random_flip": True}
    run_script(SCRIPT, *flags("images", **options))
    run_script(SCRIPT, *flags("cached", cache_latents=True, **options))
    images, cached = lora_of("images"), lora_of("cached")
    assert max(weight.abs().max() for name, weight in images.items() if "lora_B" in name) > 1e-3
    assert all(torch.allclose(images[name], cached[name], atol=1e-4) for name in images)


def test_a_copy_in_an_empty_folder_trains_by_samples_in_bf16(flags, lora_of, prompts, tmp_path, monkeypatch):
    copy = tmp_path / "copy" / "my_script.py"
    copy.parent.mkdir()
    shutil.copy(SCRIPT, copy)
    monkeypatch.chdir(copy.parent)
    options = {"train_prompts": prompts, "train_data_dir": None, "late_start": "rollout", "diffusion_weight": 0}
    options |= {"mixed_precision": "bf16", "gradient_checkpointing": True, "decode_dtype": "bf16"}
    options |= {"eval_prompts": prompts, "max_train_steps": 2, "num_inference_steps": 6}
    run_script(copy.name, *flags(**options))
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in lora_of().values())
    assert "name a model: --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev" in refused(copy)


def test_bad_input_is_one_line_that_names_it(flags, tiny_pipeline, tiny_sd3_pipeline):
    line = refused(SCRIPT, *flags(pretrained_model_name_or_path=tiny_pipeline))
    assert "it is a StableDiffusionPipeline, for train_acpo_lora_sd.py." in line
    line = refused(SCRIPT, *flags(pretrained_model_name_or_path=tiny_sd3_pipeline))
    assert "it is a StableDiffusion3Pipeline, for train_acpo_lora_sd3.py." in line
    line = refused(SCRIPT, *flags(num_inference_steps=4, tmax=20))
    assert "none below --tmax 20 / 1000: take at least" in line
    assert "--resolution must be a multiple of 4 for this model" in refused(SCRIPT, *flags(resolution=34))


def test_both_scripts_have_the_same_step_but_for_the_family():
    """What differs is guidance: Stable Diffusion 3 has it of two passes, FLUX.1 is told the scale."""
    steps = {}
    for path in (SD3_SCRIPT, SCRIPT):
        source = path.read_text()
        step = source[source.index("def training_step(") :]
        steps[path] = step[: step.index("\n\n\ndef ")]
    sd3_own = {
        "sd3.": "flux.",
        "        scale = args.guidance_scale if args.scored_guidance else 1.0\n": "",
        '        predict = partial(guided_velocity, transformer, conditions, batch["negative_conditions"], scale)\n': "",
        "            predict,\n": "            partial(flux.predict, transformer, conditions=conditions),\n",
        "model_pred=predict(late_latents, late_sigmas, late_pred)": "model_pred=late_pred",
        "conditions, batch, transformer": "conditions, transformer",
    }
    flux_own = {
        "    # FLUX.1 is told the scale of guidance: in the late window that of sampling, elsewhere that of the data.\n": "",
        "    late_conditions = flux.with_guidance(conditions, args.guidance_scale)\n": "",
        "    conditions = flux.with_guidance(conditions, args.train_guidance_scale)\n": "",
        "late_conditions": "conditions",
    }
    for path, own in ((SD3_SCRIPT, sd3_own), (SCRIPT, flux_own)):
        for words, others in own.items():
            assert words in steps[path], f"no longer in {path.name}: {words}"
            steps[path] = steps[path].replace(words, others)
    assert steps[SD3_SCRIPT] == steps[SCRIPT]


def test_a_distilled_model_is_warned_of_if_l_diff_is_on(flags, tmp_path, tiny_flux_pipeline, caplog):
    schnell = shutil.copytree(tiny_flux_pipeline, tmp_path / "FLUX.1-schnell")
    with fresh_process(), caplog.at_level(logging.WARNING):
        PartialState(cpu=True)  # which the logger asks for
        options = {"pretrained_model_name_or_path": schnell}
        script.load_models(script.parse_args(flags(**options)), torch.float32, "cpu")
        assert (
            "seems to be distilled to few steps ('schnell' is in its name), and L_diff would undo that" in caplog.text
        )
        caplog.clear()
        script.load_models(script.parse_args(flags(diffusion_weight=0, **options)), torch.float32, "cpu")
        assert "distilled" not in caplog.text
