"""The SDXL script on tiny models: what it trains by, what it writes, that it repeats itself, what it refuses."""

import json
import logging
import shutil
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import train_acpo_lora_sdxl as script
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors.torch import load_file

from acpo_utils.evaluators import load_evaluator
from acpo_utils.families import sdxl
from acpo_utils.lora import LORA_NAME, load_lora
from acpo_utils.randomness import step_generator
from acpo_utils.training import memory_estimate
from acpo_utils.training.step_cost import StepCost
from tests.launching import EXAMPLES, command_line, launch, refused, run_script
from tests.scripts.test_training_step import DEFAULTS, Recorder
from tests.tiny_models import save_tiny_sdxl, tiny_scheduler, tiny_sdxl, tiny_taesd
from tests.training.test_memory_estimate import bytes_kept


SCRIPT, SD_SCRIPT = EXAMPLES / "train_acpo_lora_sdxl.py", EXAMPLES / "train_acpo_lora_sd.py"


@pytest.fixture
def flags(tiny_sdxl_pipeline, tiny_guide, captioned_images, tmp_path, no_estimate):
    """The command line of a training of three steps, with changes; None leaves a flag out."""

    def build(output: str = "out", **changes) -> list[str]:
        options = {
            "pretrained_model_name_or_path": tiny_sdxl_pipeline,
            "evaluator": f"ipce:{tiny_guide}",
            "train_data_dir": captioned_images,
            "resolution": 32,
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


# --- The step


@pytest.fixture
def world(tiny_guide):
    pipeline = tiny_sdxl()
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        model.requires_grad_(False)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    text_encoders = torch.nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2])
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    empty = sdxl.encode_prompts(script.data.token_ids(tokenizers, [""]), text_encoders)
    evaluator = Recorder(load_evaluator(f"ipce:{tiny_guide}"))
    texts = ["a red wall", "a blue wall"]
    batch = script.data.token_ids(tokenizers, texts) | {
        "pixel_values": torch.rand(2, 3, 32, 32, generator=step_generator(0)) * 2 - 1,
        "time_ids": torch.tensor([[40.0, 60, 0, 9, 32, 32], [32, 32, 0, 0, 32, 32]]),
        "negative_conditions": sdxl.negative_conditions(empty, True),
        "prompts": texts,
    }
    models = (pipeline.unet, pipeline.vae, pipeline.vae, text_encoders)

    def step(**changes):
        args = Namespace(**(DEFAULTS | {"resolution": 32} | changes))
        own = {name: value for name, value in batch.items() if not args.train_prompts or name != "time_ids"}
        generator = step_generator(0, 0)
        return script.training_step(own, *models, evaluator, tiny_scheduler(), generator, args.anchor_weight, args)

    return SimpleNamespace(step=step, unet=pipeline.unet, models=models, batch=batch, guide=evaluator.evaluator)


def test_the_quality_gradient_reaches_every_lora_tensor_and_nothing_else(world):
    for name, parameter in world.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    world.step(diffusion_weight=0, anchor_weight=0)[0].backward()
    for name, parameter in world.unet.named_parameters():
        assert ("lora_" in name) == (parameter.grad is not None and parameter.grad.abs().sum().item() > 0), name
    assert all(p.grad is None for model in world.models[1:] for p in model.parameters())


@pytest.mark.parametrize("changes", [{}, {"late_start": "rollout"}, {"scored_guidance": True}], ids=str)
def test_which_sizes_the_unet_is_told(world, monkeypatch, changes):
    """Of data the batch's own, in every pass; of a sample the training's size, whole, but in L_diff's pass the batch's."""
    seen = []
    forward = world.unet.forward

    def noting(*args, added_cond_kwargs, **kwargs):
        seen.append((added_cond_kwargs["time_ids"], added_cond_kwargs["text_embeds"]))
        return forward(*args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(world.unet, "forward", noting)
    _, terms = world.step(**changes, tmax=300)
    assert terms["loss_anchor"] == 0, "the LoRA is new"
    own, whole = world.batch["time_ids"], torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    *late, (last, _) = seen
    assert torch.equal(last, own) and not torch.equal(own, whole)
    expected = whole if changes.get("late_start") == "rollout" else own
    for time_ids, _ in late:
        assert torch.equal(time_ids, expected.repeat(len(time_ids) // 2, 1))
    without_prompt = [pooled for _, pooled in late if not pooled[:2].any()]
    assert bool(without_prompt) == bool(changes), "guidance has passes without a prompt"


def test_prompts_alone_train_by_samples(world):
    options = {"train_prompts": "x.txt", "late_start": "rollout", "diffusion_weight": 0, "tmax": 300}
    loss, terms = world.step(**options)
    loss.backward()
    assert set(terms) >= {"loss_anchor", "loss_quality", "score"} and "loss_diffusion" not in terms


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"late_start": "rollout"}], ids=str)
def test_the_estimate_keeps_what_a_step_keeps(world, changes):
    more = {"train_batch_size": 2, "mixed_precision": "no", "cache_latents": True, "seed": 0, "decode_dtype": "fp32"}
    args = Namespace(
        **(DEFAULTS | {"resolution": 32, "gradient_checkpointing": False} | more | {"tmax": 300} | changes)
    )
    if args.gradient_checkpointing:
        world.unet.enable_gradient_checkpointing()
        script.late_step.checkpoint_decoder(world.models[2])
    guide_inputs = (torch.rand(2, 3, 32, 32), world.batch["prompts"])
    with torch.no_grad():
        world.guide.score(*guide_inputs)
    conditions = sdxl.as_sampled(world.batch["negative_conditions"], (32, 32))
    cost = StepCost(
        script.training_step,
        world.models,
        (world.guide, *guide_inputs),
        tiny_scheduler(),
        conditions,
        torch.device("cpu"),
    )
    parts = memory_estimate.memory_parts(cost, {"guide": [world.guide]}, args)
    estimated = sum(size for part, size in parts.items() if part.startswith("kept"))
    changes = {name: value for name, value in changes.items() if name != "gradient_checkpointing"}
    found = bytes_kept(lambda: world.step(**changes, tmax=300)[0], [*world.models, world.guide])
    assert estimated == pytest.approx(found, rel=0.03)
    assert parts["weights: text encoder"] == sum(p.nbytes for p in world.models[3].parameters())


# --- The script


def test_outputs_and_the_lora_in_the_stock_pipeline(flags, lora_of, prompts, tmp_path, tiny_sdxl_pipeline):
    """By `accelerate launch`; the other tests run the script in this process."""
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2"]
    options = {"rank": 3, "lora_alpha": 6, "lora_target_modules": ",".join(targets), "learning_rate": 1e-2}
    options |= {"validation_steps": 2, "validation_prompt": "a red wall", "num_validation_images": 1}
    launch(SCRIPT, *flags(eval_prompts=prompts, num_inference_steps=2, checkpointing_steps=3, **options))
    folder = tmp_path / "out"
    made = {path.name for path in folder.iterdir()}
    assert made >= {"checkpoint-3", "comparison.png", "metrics.json", "validation", "README.md", LORA_NAME}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["comparisons"]["guide"]["n"] == 2 and metrics["sets"]["drift"][0] > 0
    assert "stable-diffusion-xl" in (folder / "README.md").read_text()
    weights = lora_of()
    assert all(name.startswith("unet.") and weight.abs().sum() > 0 for name, weight in weights.items())

    def picture(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
        return pipeline("a red wall", generator=torch.Generator().manual_seed(0), **settings).images

    base, stock, trained = (
        StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_pipeline, add_watermarker=False) for _ in range(3)
    )
    stock.load_lora_weights(folder)
    trained.unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    load_lora(trained.unet, folder, pipeline_class=StableDiffusionXLPipeline)
    torch.testing.assert_close(picture(stock), picture(trained), atol=1e-5, rtol=0)
    assert not torch.allclose(picture(stock), picture(base), atol=1e-3)


def test_resume_equals_the_uninterrupted_run_bit_for_bit(flags, lora_of, tmp_path):
    options = {"gradient_accumulation_steps": 2, "random_flip": True, "train_batch_size": 1, "checkpointing_steps": 2}
    run_script(SCRIPT, *flags("whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run_script(SCRIPT, *flags("resumed", resume_from_checkpoint="latest", **options))
    whole, resumed = lora_of("whole"), lora_of("resumed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    changed = flags("resumed", resume_from_checkpoint="latest", **options, decode_dtype="bf16")
    assert "--decode_dtype fp32 (now bf16)" in refused(SCRIPT, *changed)


def test_a_training_on_kept_latents_is_the_training_on_images(flags, lora_of, tmp_path, monkeypatch):
    """The encoders are asked once for each image and caption; the pictures, 40 x 36, are mirrored or not."""
    calls = []
    encode_prompts = sdxl.encode_prompts

    def counting(batch, text_encoders):
        calls.append("prompt_embeds" in batch)
        return encode_prompts(batch, text_encoders)

    monkeypatch.setattr(sdxl, "encode_prompts", counting)
    options = {"center_crop": True, "random_flip": True}
    run_script(SCRIPT, *flags("images", **options))
    calls.clear()
    run_script(SCRIPT, *flags("cached", cache_latents=True, **options))
    assert calls.count(False) == 12 + 1 and calls.count(True) == 3, "twelve captions, no prompt; three steps"
    images, cached = lora_of("images"), lora_of("cached")
    assert max(weight.abs().max() for name, weight in images.items() if "lora_B" in name) > 1e-3
    assert all(torch.allclose(images[name], cached[name], atol=1e-4) for name in images)
    kept = load_file(tmp_path / "cached" / "latents" / "latents-00000.safetensors")
    assert kept["prompt_embeds 0"].shape == (1, 16, 56) and kept["pooled_prompt_embeds 0"].shape == (1, 20)
    assert kept["crop time_ids 0"].tolist() == [[36, 40, 0, 2, 32, 32], [36, 40, 0, 2, 32, 32]]


def test_a_copy_in_an_empty_folder_runs_in_bf16_with_a_cheap_decode(flags, lora_of, tmp_path, monkeypatch):
    copy = tmp_path / "copy" / "my_script.py"
    copy.parent.mkdir()
    shutil.copy(SCRIPT, copy)
    monkeypatch.chdir(copy.parent)
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    options = {"decode": "tiny", "tiny_vae_name_or_path": tmp_path / "taesd", "decode_dtype": "bf16"}
    options |= {"mixed_precision": "bf16", "gradient_checkpointing": True, "max_train_steps": 2}
    run_script(copy.name, *flags(**options))
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in lora_of().values())
    assert "name a model: --pretrained_model_name_or_path" in refused(copy)


def test_a_distilled_model_is_warned_of_and_trains_without_l_diff(flags, prompts, tmp_path, caplog):
    """Four steps end at t = 249, whose way of sampling is "trailing"; there is no guidance."""
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    turbo = save_tiny_sdxl(tmp_path / "model", scheduler=scheduler)
    with caplog.at_level(logging.WARNING):
        run_script(SCRIPT, *flags("data", pretrained_model_name_or_path=turbo, max_train_steps=1))
        assert "seems to be distilled to few steps (timestep_spacing of its scheduler is trailing)" in caplog.text
        caplog.clear()
        options = {"train_prompts": prompts, "train_data_dir": None, "late_start": "rollout", "diffusion_weight": 0}
        options |= {"num_inference_steps": 4, "guidance_scale": 0, "tmax": 300, "eval_prompts": prompts}
        run_script(SCRIPT, *flags("prompts", pretrained_model_name_or_path=turbo, max_train_steps=1, **options))
        assert "distilled" not in caplog.text
    options["tmax"] = 100
    message = refused(SCRIPT, *flags("short", pretrained_model_name_or_path=turbo, **options))
    assert "4 sampling steps end at t = 249, none below tmax 100: take more sampling steps or a larger tmax" in message


def test_another_familys_folder_is_refused_by_the_name_of_its_script(
    flags, sd_flags, tiny_pipeline, tiny_sdxl_pipeline
):
    line = refused(SCRIPT, *flags(pretrained_model_name_or_path=tiny_pipeline))
    assert "it is a StableDiffusionPipeline, for train_acpo_lora_sd.py." in line
    line = refused(SD_SCRIPT, *sd_flags(pretrained_model_name_or_path=tiny_sdxl_pipeline))
    assert "it is a StableDiffusionXLPipeline, for train_acpo_lora_sdxl.py." in line


BAD_INPUT = {
    "vae": ({"pretrained_vae_model_name_or_path": "no/such/vae"}, "expected an AutoencoderKL"),
    "decode": ({"decode": "crop"}, "--decode crop goes with --decode_size"),
    "resolution": ({"resolution": 33}, "--resolution must be a multiple of 4"),
    "random crops": ({"cache_latents": True}, "--cache_latents needs images and --center_crop"),
    "targets": ({"lora_target_modules": "to_z"}, "'to_z' matches nothing"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_that_names_it(flags, case):
    changes, expected = BAD_INPUT[case]
    assert expected in refused(SCRIPT, *flags(**changes))


def test_both_scripts_have_the_same_step_but_for_the_family():
    """What is SDXL's own is stated where it differs: which sizes a sample is told."""
    steps = []
    for path in (SD_SCRIPT, SCRIPT):
        source = path.read_text()
        step = source[source.index("    loss_diffusion = loss_anchor") : source.index("# Data\n")]
        steps.append(step[: step.index("\n\n\ndef ")])
    own = steps[1]
    begin, end = own.index("    late_conditions = conditions\n"), own.index("    if not args.train_prompts")
    own = own[:begin] + own[end:]
    own = own.replace("late_conditions", "conditions").replace("sdxl.", "stable_diffusion.")
    own = own.replace("text_encoders", "text_encoder").replace(", and each image's size and crop", "")
    assert own == steps[0]
