"""The Z-Image script on tiny models: what it tells the transformer, what it writes, that it repeats itself, what it refuses.

What it has in common with train_acpo_lora_sd3.py, all but the lines that the last test names, is tested there.
"""

import contextlib
import json
import logging
import shutil
from argparse import Namespace

import pytest
import torch
import train_acpo_lora_z_image as script
from diffusers import ZImagePipeline
from peft import LoraConfig
from safetensors.torch import load_file

from acpo_utils.evaluators import load_evaluator
from acpo_utils.families import z_image
from acpo_utils.lora import LORA_NAME, load_lora
from acpo_utils.randomness import step_generator
from acpo_utils.training import memory_estimate
from acpo_utils.training.step_cost import StepCost
from tests.launching import EXAMPLES, command_line, launch, refused, run_script
from tests.scripts.test_train_acpo_lora_sd3 import FLOW_DEFAULTS
from tests.tiny_models import tiny_taesd, tiny_z_image
from tests.training.test_memory_estimate import bytes_kept


SCRIPT, SD3_SCRIPT = EXAMPLES / "train_acpo_lora_z_image.py", EXAMPLES / "train_acpo_lora_sd3.py"
Z_IMAGE_DEFAULTS = FLOW_DEFAULTS | {
    "tmax": 700,  # five steps end at sigma = 0.6
    "weighting_scheme": "none",
    "max_sequence_length": 60,
    "cfg_normalization": 0.0,
    "cfg_truncation": 1.0,
}


@pytest.fixture
def flags(tiny_z_image_pipeline, tiny_guide, captioned_images, tmp_path, no_estimate):
    """The command line of a training of three steps, with changes; None leaves a flag out."""

    def build(output: str = "out", **changes) -> list[str]:
        options = {
            "pretrained_model_name_or_path": tiny_z_image_pipeline,
            "evaluator": f"ipce:{tiny_guide}",
            "train_data_dir": captioned_images,
            "resolution": 32,
            "max_sequence_length": 60,
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
    (tmp_path / "prompts.txt").write_text("a red wall\na blue wall with a window, seen from afar\n")
    return tmp_path / "prompts.txt"


@pytest.fixture
def world(tiny_guide):
    """A step of two captions, one of 32 tokens at most and one of more."""
    pipeline = tiny_z_image()
    text_encoders = torch.nn.ModuleList([pipeline.text_encoder])
    for model in (pipeline.transformer, pipeline.vae, text_encoders):
        model.requires_grad_(False)
    torch.manual_seed(0)
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=z_image.TARGETS.split(",")))
    tokenizers = [z_image.ChatTokenizer(pipeline.tokenizer, 60, enable_thinking=True)]
    guide, texts = load_evaluator(f"ipce:{tiny_guide}"), ["a red wall", "a blue wall with a window, seen from afar"]
    batch = script.data.token_ids(tokenizers, texts) | {
        "pixel_values": torch.rand(2, 3, 32, 32, generator=step_generator(0)) * 2 - 1,
        "negative_conditions": z_image.encode_prompts(script.data.token_ids(tokenizers, [""]), text_encoders),
        "prompts": texts,
    }
    models = (pipeline.transformer, pipeline.vae, pipeline.vae, text_encoders)

    def step(**changes):
        args = Namespace(**(Z_IMAGE_DEFAULTS | changes))
        generator = step_generator(0, 0)
        return script.training_step(batch, *models, guide, pipeline.scheduler, generator, args.anchor_weight, args)

    return Namespace(step=step, models=models, pipeline=pipeline, batch=batch, guide=guide)


CHANGES = {
    "data": {},
    "rollout": {"late_start": "rollout"},
    "unguided rollout": {"late_start": "rollout", "guidance_scale": 0.0},
    "guided": {"scored_guidance": True, "late_steps": 2, "cfg_normalization": 0.9, "cfg_truncation": 0.8},
}


@pytest.mark.parametrize("case", CHANGES)
def test_which_clock_and_captions_the_transformer_is_told(world, monkeypatch, case):
    """1 - sigma, above 0.3 in the window; guided passes have no prompt; each caption in its own length."""
    told, clock, lengths, forward = [], [], set(), world.pipeline.transformer.forward
    (empty,) = world.batch["negative_conditions"]["prompt_embeds"]

    def noting(pictures, t, captions, **kwargs):
        clock.append(t)
        told.append(all(torch.equal(caption, empty) for caption in captions))
        lengths.add(tuple(map(len, captions)))
        return forward(pictures, t, captions, **kwargs)

    monkeypatch.setattr(world.pipeline.transformer, "forward", noting)
    loss, terms = world.step(**CHANGES[case])
    loss.backward()
    assert terms["loss_anchor"] == 0 and (terms["late_timesteps"] < 700).all()
    guided = CHANGES[case].get("guidance_scale", 1) and case not in ("data",)
    assert lengths == {(21, 52)} | ({(11, 11)} if guided else set())
    *late, last = clock
    grid = world.pipeline.scheduler.sigmas
    assert len(grid) == 1000 and torch.isclose(1 - last[:, None], grid, atol=1e-6).any(1).all()
    if case == "data":
        assert len(late) == 2 and torch.equal(*late) and (late[0] > 0.3).all()
    elif case == "guided":
        assert told == [False, False, True, False, True, False]
        torch.testing.assert_close(1 - late[3], (1 - late[0]) / 2)
    else:
        sampled = z_image.schedule(world.pipeline.scheduler, (2, 16, 16, 16), 5)
        before = int((1000 * sampled >= 700).sum())
        assert told == ([False, True] if guided else [False]) * before + [False] * 3
        each = late[: 2 * before : 2] if guided else late[:before]
        assert [t[0].item() for t in each] == pytest.approx((1 - sampled[:before]).tolist(), abs=1e-6)


@pytest.mark.parametrize("case", ["rollout", "guided"])
def test_all_of_a_step_is_on_the_models_device(world, monkeypatch, case):
    """Which is "meta" here, that takes no tensor of another; it has no autocast, and the guide's tokens are real."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(world.guide, "score", lambda images, prompts: images.mean((1, 2, 3)).sigmoid())
    kept = z_image.encode_prompts(world.batch, world.models[3]) | {"pixel_values": world.batch["pixel_values"]}
    world.batch |= script.data.to_device(kept, "meta")
    world.batch["negative_conditions"] = script.data.to_device(world.batch["negative_conditions"], "meta")
    for model in world.models[:2]:
        model.to("meta")
    loss, terms = world.step(**CHANGES[case])
    loss.backward()
    assert {term.device.type for term in terms.values()} == {"meta"}


def test_a_step_of_two_captions_of_unlike_length_is_the_mean_of_each_alone(world):
    """In what it says and in its gradient, with the same noise."""
    losses, gradients = [], []
    transformer = world.pipeline.transformer
    trained = transformer.layers[0].attention.to_q.lora_B["default"].weight
    noises = torch.randn(2, 16, 16, 16, generator=step_generator(9))
    for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
        conditions = z_image.encode_prompts({"input_ids": world.batch["input_ids"][rows]}, world.models[3])
        pred = z_image.predict(transformer, noises[rows], torch.tensor([0.2, 0.1])[rows], conditions)
        loss = (pred - 1).pow(2).mean()
        gradients.append(torch.autograd.grad(loss, trained)[0])
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], (losses[1] + losses[2]) / 2)
    torch.testing.assert_close(gradients[0], (gradients[1] + gradients[2]) / 2, atol=1e-6, rtol=1e-4)


def test_the_estimate_keeps_what_a_step_keeps(world):
    world.pipeline.transformer.enable_gradient_checkpointing()
    script.late_step.checkpoint_decoder(world.pipeline.vae)
    more = {"train_batch_size": 2, "mixed_precision": "no", "cache_latents": True, "seed": 0, "decode_dtype": "fp32"}
    args = Namespace(**(Z_IMAGE_DEFAULTS | {"gradient_checkpointing": True} | more))
    guide_inputs = (torch.rand(2, 3, 32, 32), world.batch["prompts"])
    with torch.no_grad():
        world.guide.score(*guide_inputs)
    conditions = z_image.encode_prompts(world.batch, world.models[3])
    world.batch["prompt_embeds"] = [conditions["prompt_embeds"][1]] * 2  # the estimate is of captions of one length
    cost = StepCost(
        script.training_step,
        world.models,
        (world.guide, *guide_inputs),
        world.pipeline.scheduler,
        z_image.longest_conditions(world.batch["negative_conditions"], 52),
        torch.device("cpu"),
    )
    parts = memory_estimate.memory_parts(cost, {"guide": [world.guide]}, args)
    estimated = sum(size for part, size in parts.items() if part.startswith("kept"))
    found = bytes_kept(lambda: world.step()[0], [*world.models, world.guide])
    assert estimated == pytest.approx(found, rel=0.06)


# --- The script


@pytest.mark.parametrize("run", [run_script, pytest.param(launch, marks=pytest.mark.slow)])
def test_outputs_and_the_lora_in_the_stock_pipeline(run, flags, lora_of, prompts, tmp_path, tiny_z_image_pipeline):
    """In this process and, of the slow tests, by `accelerate launch`."""
    targets = ["to_q", "to_k", "to_v", "to_out.0", "feed_forward.w2"]
    options = {"rank": 3, "lora_alpha": 6, "lora_layers": ",".join(targets), "learning_rate": 1e-2}
    options |= {"validation_steps": 2, "validation_prompt": "a red wall", "num_validation_images": 1}
    run(SCRIPT, *flags(eval_prompts=prompts, num_inference_steps=5, tmax=700, checkpointing_steps=3, **options))
    folder = tmp_path / "out"
    made = {path.name for path in folder.iterdir()}
    assert made >= {"checkpoint-3", "comparison.png", "metrics.json", "validation", "README.md", LORA_NAME}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["comparisons"]["guide"]["n"] == 2 and metrics["sets"]["drift"][0] > 0
    assert "z-image" in (folder / "README.md").read_text()
    weights = lora_of()
    assert all(name.startswith("transformer.") and weight.abs().sum() > 0 for name, weight in weights.items())

    def picture(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 3, "height": 32, "width": 32, "max_sequence_length": 60}
        generator = torch.Generator().manual_seed(0)
        return pipeline("a red wall", generator=generator, output_type="pt", **settings).images

    base, stock, trained = (ZImagePipeline.from_pretrained(tiny_z_image_pipeline) for _ in range(3))
    stock.load_lora_weights(folder, weight_name=LORA_NAME)
    trained.transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    load_lora(trained.transformer, folder, pipeline_class=ZImagePipeline)
    torch.testing.assert_close(picture(stock), picture(trained), atol=1e-5, rtol=0)
    assert not torch.allclose(picture(stock), picture(base), atol=1e-3)


def test_resume_equals_the_uninterrupted_run_bit_for_bit(flags, lora_of, tmp_path):
    options = {"gradient_accumulation_steps": 2, "random_flip": True, "train_batch_size": 1, "checkpointing_steps": 2}
    run_script(SCRIPT, *flags("whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    validated = {"guidance_scale": 4, "cfg_normalization": 1}  # of validation alone
    run_script(SCRIPT, *flags("resumed", resume_from_checkpoint="latest", **options, **validated))
    whole, resumed = lora_of("whole"), lora_of("resumed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    changed = flags("resumed", resume_from_checkpoint="latest", **options, scored_guidance=True, cfg_truncation=0.5)
    line = refused(SCRIPT, *changed)
    assert "--scored_guidance False (now True)" in line and "--cfg_truncation 1.0 (now 0.5)" in line


def test_a_training_on_kept_latents_is_the_training_on_images(flags, lora_of, tmp_path, captioned_images):
    options = {"center_crop": True, "random_flip": True}
    run_script(SCRIPT, *flags("images", **options))
    run_script(SCRIPT, *flags("cached", cache_latents=True, **options))
    images, cached = lora_of("images"), lora_of("cached")
    assert max(weight.abs().max() for name, weight in images.items() if "lora_B" in name) > 1e-3
    assert all(torch.allclose(images[name], cached[name], atol=1e-4) for name in images)
    kept = load_file(tmp_path / "cached" / "latents" / "latents-00000.safetensors")
    lengths = [len(kept[f"caption 0 prompt_embeds {row}"]) for row in range(12)]
    assert len(set(lengths)) > 1 and max(lengths) < 60, "no padding"
    longer = flags("cached", cache_latents=True, **options, max_sequence_length=50)
    assert "holds latents of another run (tokens [60] there, now [50])" in refused(SCRIPT, *longer)


def test_a_copy_in_an_empty_folder_trains_by_samples_in_bf16(flags, lora_of, prompts, tmp_path, monkeypatch):
    copy = tmp_path / "copy" / "my_script.py"
    copy.parent.mkdir()
    shutil.copy(SCRIPT, copy)
    monkeypatch.chdir(copy.parent)
    tiny_taesd(latent_channels=16).save_pretrained(tmp_path / "taef1")
    options = {"train_prompts": prompts, "train_data_dir": None, "late_start": "rollout", "diffusion_weight": 0}
    options |= {"mixed_precision": "bf16", "gradient_checkpointing": True, "decode_dtype": "bf16"}
    options |= {"decode": "tiny", "tiny_vae_name_or_path": tmp_path / "taef1"}
    options |= {
        "eval_prompts": prompts,
        "max_train_steps": 2,
        "num_inference_steps": 5,
        "tmax": 700,
        "cfg_normalization": 1,
    }
    run_script(copy.name, *flags(**options))
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in lora_of().values())
    assert "name a model: --pretrained_model_name_or_path Tongyi-MAI/Z-Image" in refused(copy)


def test_turbo_is_warned_of_and_trains_by_its_samples_without_l_diff(flags, prompts, tmp_path, caplog):
    turbo = tiny_z_image(scheduler=script.z_image.FlowMatchEulerDiscreteScheduler(shift=3.0))
    turbo.save_pretrained(tmp_path / "quick")
    options = {
        "pretrained_model_name_or_path": tmp_path / "quick",
        "max_train_steps": 1,
        "num_inference_steps": 4,
        "tmax": 650,
    }
    with caplog.at_level(logging.WARNING):
        run_script(SCRIPT, *flags("data", **options))
        assert "distilled to few steps (its scheduler's shift is 3, Z-Image-Turbo's)" in caplog.text
        caplog.clear()
        options |= {"train_prompts": prompts, "train_data_dir": None, "late_start": "rollout", "diffusion_weight": 0}
        run_script(SCRIPT, *flags("prompts", **options, guidance_scale=0, eval_prompts=prompts))
        assert "distilled" not in caplog.text


def test_bad_input_is_one_line_that_names_it(flags, tiny_pipeline, tiny_sd3_pipeline, tiny_z_image_pipeline):
    line = refused(SCRIPT, *flags(pretrained_model_name_or_path=tiny_pipeline))
    assert "it is a StableDiffusionPipeline, for train_acpo_lora_sd.py." in line
    line = refused(SCRIPT, *flags(pretrained_model_name_or_path=tiny_sd3_pipeline))
    assert "it is a StableDiffusion3Pipeline, for train_acpo_lora_sd3.py." in line
    line = refused(SD3_SCRIPT, *flags(pretrained_model_name_or_path=tiny_z_image_pipeline))
    assert "it is a ZImagePipeline, for train_acpo_lora_z_image.py." in line
    line = refused(SCRIPT, *flags(num_inference_steps=8))
    assert "none below --tmax 250 / 1000: take at least" in line
    assert "--resolution must be a multiple of 4 for this model" in refused(SCRIPT, *flags(resolution=34))
    assert "--cfg_normalization: expected at least 0, found -1.0" in refused(SCRIPT, *flags(cfg_normalization=-1))


def test_the_step_is_that_of_stable_diffusion_3_but_for_the_family():
    """Captions are a list here, and guidance has two numbers more and is off at 0, where it is at 1 there."""
    steps = {}
    for path in (SD3_SCRIPT, SCRIPT):
        source = path.read_text()
        step = source[source.index("def training_step(") :]
        steps[path] = step[: step.index("\n\n\ndef ")]
    own = {
        "z_image.": "sd3.",
        "# {name: [(tokens, dim)] * B}  c": "# {name: (B, ...)}  c",
        'conditions["prompt_embeds"][0].dtype': 'conditions["prompt_embeds"].dtype',
        "args.scored_guidance else 0.0": "args.scored_guidance else 1.0",
        'batch["negative_conditions"], scale, args)': 'batch["negative_conditions"], scale)',
    }
    for words, others in own.items():
        assert words in steps[SCRIPT], f"no longer in {SCRIPT.name}: {words}"
        steps[SCRIPT] = steps[SCRIPT].replace(words, others)
    assert steps[SD3_SCRIPT] == steps[SCRIPT]
