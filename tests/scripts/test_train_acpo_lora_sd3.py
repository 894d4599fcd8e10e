"""The Stable Diffusion 3 script on tiny models: what it trains by, what it writes, that it repeats itself, what it refuses."""

import contextlib
import json
import logging
import shutil
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import train_acpo_lora_sd3 as script
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors.torch import load_file

from acpo_utils.evaluators import load_evaluator
from acpo_utils.families import sd3
from acpo_utils.lora import LORA_NAME, load_lora
from acpo_utils.randomness import step_generator
from acpo_utils.training import memory_estimate
from acpo_utils.training.step_cost import StepCost
from tests.launching import EXAMPLES, command_line, launch, refused, run_script
from tests.scripts.test_training_step import DEFAULTS, Recorder
from tests.tiny_models import tiny_sd3, tiny_taesd
from tests.training.test_memory_estimate import bytes_kept


SCRIPT = EXAMPLES / "train_acpo_lora_sd3.py"
FLOW_DEFAULTS = DEFAULTS | {
    "tmax": 250,
    "resolution": 32,
    "max_sequence_length": 24,
    "weighting_scheme": "logit_normal",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
}
FOUR_LOSSES = [4.05491, 3.98317, 3.87739, 3.85480]


@pytest.fixture
def flags(tiny_sd3_pipeline, tiny_guide, captioned_images, tmp_path, no_estimate):
    """The command line of a training of three steps, with changes; None leaves a flag out."""

    def build(output: str = "out", **changes) -> list[str]:
        options = {
            "pretrained_model_name_or_path": tiny_sd3_pipeline,
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


# --- The step


@pytest.fixture
def world(tiny_guide):
    pipeline = tiny_sd3()
    parts = [pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2]
    for model in (*parts, pipeline.text_encoder_3):
        model.requires_grad_(False)
    torch.manual_seed(0)
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=sd3.TARGETS.split(",")))
    text_encoders = torch.nn.ModuleList([*parts[2:], pipeline.text_encoder_3])
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3]
    tokenizers[2].model_max_length = 24
    evaluator = Recorder(load_evaluator(f"ipce:{tiny_guide}"))
    texts = ["a red wall", "a blue wall"]
    batch = script.data.token_ids(tokenizers, texts) | {
        "pixel_values": torch.rand(2, 3, 32, 32, generator=step_generator(0)) * 2 - 1,
        "negative_conditions": sd3.encode_prompts(script.data.token_ids(tokenizers, [""]), text_encoders),
        "prompts": texts,
    }
    models = (pipeline.transformer, pipeline.vae, pipeline.vae, text_encoders)

    def step(position=0, **changes):
        args = Namespace(**(FLOW_DEFAULTS | changes))
        generator = step_generator(0, position)
        return script.training_step(batch, *models, evaluator, pipeline.scheduler, generator, args.anchor_weight, args)

    return SimpleNamespace(
        step=step,
        transformer=pipeline.transformer,
        scheduler=pipeline.scheduler,
        models=models,
        batch=batch,
        evaluator=evaluator,
    )


def idle(name: str) -> bool:
    """The last block asks for no further state of the text: of its add_q_proj nothing is used."""
    return name.startswith("transformer_blocks.1.attn.add_q_proj")


def test_the_quality_gradient_reaches_every_lora_tensor_that_is_used_and_nothing_else(world):
    for name, parameter in world.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    world.step(diffusion_weight=0, anchor_weight=0)[0].backward()
    for name, parameter in world.transformer.named_parameters():
        moved = parameter.grad is not None and parameter.grad.abs().sum().item() > 0
        assert moved == ("lora_" in name and not idle(name)), name
    assert all(p.grad is None for model in world.models[1:] for p in model.parameters())


def test_a_new_lora_has_no_anchor_loss_and_the_terms_sum_to_the_loss(world):
    loss, terms = world.step()
    assert terms["loss_anchor"].item() == 0.0
    assert terms["loss_quality"].item() == pytest.approx(1 - terms["score"].mean().item(), abs=1e-6)
    expected = terms["loss_diffusion"] + terms["loss_anchor"] + 0.1 * terms["loss_quality"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms["late_timesteps"].dtype == torch.long and (terms["late_timesteps"] < 250).all()
    ((images, seen),) = world.evaluator.seen
    assert images.shape == (2, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    assert seen == world.batch["prompts"]


def test_the_loss_sequence_of_four_steps_is_fixed(world):
    """Any change of the mathematics or of a draw moves these; say in the commit why."""
    optimizer = torch.optim.AdamW([p for p in world.transformer.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for position in range(4):
        loss, _ = world.step(position)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found == pytest.approx(FOUR_LOSSES, rel=1e-3)


CHANGES = {
    "data": {},
    "rollout": {"late_start": "rollout"},
    "guided": {"scored_guidance": True, "late_steps": 2},
    "late": {"diffusion_timesteps": "late"},
}


@pytest.mark.parametrize("case", CHANGES)
def test_which_sigmas_the_transformer_is_told(world, monkeypatch, case):
    """1000 sigma; late ones below 250, those of L_diff of the scheduler's own grid; guided passes have no prompt."""
    clock, told = [], []
    forward = world.transformer.forward

    def noting(*args, timestep, encoder_hidden_states, **kwargs):
        clock.append(timestep)
        told.append(torch.equal(encoder_hidden_states[0], world.batch["negative_conditions"]["prompt_embeds"][0]))
        return forward(*args, timestep=timestep, encoder_hidden_states=encoder_hidden_states, **kwargs)

    monkeypatch.setattr(world.transformer, "forward", noting)
    world.step(**CHANGES[case])
    if case == "late":
        assert len(clock) == 2 and torch.equal(*clock) and (clock[0] < 250).all()
        return
    *late, last = clock
    grid = 1000 * world.scheduler.sigmas
    assert torch.isclose(last[:, None], grid, atol=1e-3).any(1).all() and len(world.scheduler.sigmas) == 1000
    if case == "data":
        assert len(late) == 2 and torch.equal(*late) and (late[0] < 250).all() and not any(told)
    elif case == "rollout":  # five steps, of which the last is in the window: four guided ones lead to it
        sampled = sd3.schedule(world.scheduler, (2, 16, 16, 16), 5)
        assert [t[0].item() for t in late[:8:2]] == pytest.approx((1000 * sampled[:4]).tolist())
        assert told == [False, True] * 4 + [False] * 3
        assert [t[0].item() for t in late[8:]] == pytest.approx([1000 * sampled[4].item()] * 2)
    else:  # anchor, prompt, no prompt; then half way to 0, with and without
        assert told == [False, False, True, False, True, False]
        torch.testing.assert_close(late[3], late[0] / 2)


@pytest.mark.parametrize("case", CHANGES)
def test_all_of_a_step_is_on_the_models_device(world, monkeypatch, case):
    """Which is "meta" here, that takes no tensor of another; it has no autocast, and the guide's tokens are real."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(world.evaluator, "score", lambda images, prompts: images.mean((1, 2, 3)).sigmoid())
    empty = world.batch.pop("negative_conditions")
    for name in ("input_ids", "input_ids_2", "input_ids_3"):
        del world.batch[name]
    kept = {name: rows.expand(2, *rows.shape[1:]) for name, rows in empty.items()}
    world.batch |= script.data.to_device(kept | {"pixel_values": world.batch["pixel_values"]}, "meta")
    world.batch["negative_conditions"] = script.data.to_device(empty, "meta")
    for model in world.models[:2]:
        model.to("meta")
    loss, terms = world.step(**CHANGES[case])
    loss.backward()
    assert {term.device.type for term in terms.values()} == {"meta"}


def test_prompts_alone_train_by_samples(world):
    options = {"train_prompts": "x.txt", "late_start": "rollout", "diffusion_weight": 0}
    loss, terms = world.step(**options)
    loss.backward()
    assert set(terms) >= {"loss_anchor", "loss_quality", "score"} and "loss_diffusion" not in terms


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"late_start": "rollout"}], ids=str)
def test_the_estimate_keeps_what_a_step_keeps(world, changes):
    more = {"train_batch_size": 2, "mixed_precision": "no", "cache_latents": True, "seed": 0, "decode_dtype": "fp32"}
    args = Namespace(**(FLOW_DEFAULTS | {"gradient_checkpointing": False} | more | changes))
    if args.gradient_checkpointing:
        world.transformer.enable_gradient_checkpointing()
        script.late_step.checkpoint_decoder(world.models[2])
    guide, guide_inputs = world.evaluator.evaluator, (torch.rand(2, 3, 32, 32), world.batch["prompts"])
    with torch.no_grad():
        guide.score(*guide_inputs)
    cost = StepCost(
        script.training_step,
        world.models,
        (guide, *guide_inputs),
        world.scheduler,
        world.batch["negative_conditions"],
        torch.device("cpu"),
    )
    parts = memory_estimate.memory_parts(cost, {"guide": [guide]}, args)
    estimated = sum(size for part, size in parts.items() if part.startswith("kept"))
    changes = {name: value for name, value in changes.items() if name != "gradient_checkpointing"}
    found = bytes_kept(lambda: world.step(**changes)[0], [*world.models, guide])
    # What the losses keep beside the models, here 4 % with checkpointing, is nothing beside a real model's activations.
    assert estimated == pytest.approx(found, rel=0.05)


# --- The script


def test_outputs_and_the_lora_in_the_stock_pipeline(flags, lora_of, prompts, tmp_path, tiny_sd3_pipeline):
    """By `accelerate launch`; the other tests run the script in this process."""
    targets = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2"]
    options = {"rank": 3, "lora_alpha": 6, "lora_layers": ",".join(targets), "learning_rate": 1e-2}
    options |= {"validation_steps": 2, "validation_prompt": "a red wall", "num_validation_images": 1}
    launch(SCRIPT, *flags(eval_prompts=prompts, num_inference_steps=2, checkpointing_steps=3, **options))
    folder = tmp_path / "out"
    made = {path.name for path in folder.iterdir()}
    assert made >= {"checkpoint-3", "comparison.png", "metrics.json", "validation", "README.md", LORA_NAME}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["comparisons"]["guide"]["n"] == 2 and metrics["sets"]["drift"][0] > 0
    assert "sd3-diffusers" in (folder / "README.md").read_text()
    weights = lora_of()
    assert all(name.startswith("transformer.") and weight.abs().sum() > 0 for name, weight in weights.items())

    def picture(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
        settings["max_sequence_length"] = 24
        return pipeline("a red wall", generator=torch.Generator().manual_seed(0), **settings).images

    base, stock, trained = (StableDiffusion3Pipeline.from_pretrained(tiny_sd3_pipeline) for _ in range(3))
    stock.load_lora_weights(folder, weight_name=LORA_NAME)
    trained.transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    load_lora(trained.transformer, folder, pipeline_class=StableDiffusion3Pipeline)
    torch.testing.assert_close(picture(stock), picture(trained), atol=1e-5, rtol=0)
    assert not torch.allclose(picture(stock), picture(base), atol=1e-3)


def test_resume_equals_the_uninterrupted_run_bit_for_bit(flags, lora_of, tmp_path):
    options = {"gradient_accumulation_steps": 2, "random_flip": True, "train_batch_size": 1, "checkpointing_steps": 2}
    run_script(SCRIPT, *flags("whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run_script(SCRIPT, *flags("resumed", resume_from_checkpoint="latest", **options))
    whole, resumed = lora_of("whole"), lora_of("resumed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    changed = flags("resumed", resume_from_checkpoint="latest", **options, weighting_scheme="mode")
    assert "--weighting_scheme logit_normal (now mode)" in refused(SCRIPT, *changed)


def test_a_training_on_kept_latents_is_the_training_on_images(flags, lora_of, tmp_path, monkeypatch):
    """The encoders are asked once for each image and caption, and then wait on the CPU."""
    calls, offloaded = [], []
    encode_prompts = sd3.encode_prompts

    def counting(batch, text_encoders):
        calls.append("prompt_embeds" in batch)
        return encode_prompts(batch, text_encoders)

    monkeypatch.setattr(sd3, "encode_prompts", counting)
    options = {"center_crop": True, "random_flip": True}
    run_script(SCRIPT, *flags("images", **options))
    calls.clear()
    monkeypatch.setattr("acpo_utils.families.latents.offload_encoders", lambda *models: offloaded.extend(models))
    run_script(SCRIPT, *flags("cached", cache_latents=True, **options))
    assert calls.count(False) == 12 + 1 and calls.count(True) == 3, "twelve captions, no prompt; three steps"
    assert [type(model).__name__ for model in offloaded[1:]] == 2 * ["CLIPTextModelWithProjection"] + [
        "T5EncoderModel"
    ]
    images, cached = lora_of("images"), lora_of("cached")
    assert max(weight.abs().max() for name, weight in images.items() if "lora_B" in name) > 1e-3
    assert all(torch.allclose(images[name], cached[name], atol=1e-4) for name in images)
    kept = load_file(tmp_path / "cached" / "latents" / "latents-00000.safetensors")
    assert kept["prompt_embeds 0"].shape == (1, 40, 64) and kept["pooled_prompt_embeds 0"].shape == (1, 40)
    longer = flags("cached", cache_latents=True, **options, max_sequence_length=12)
    assert "holds latents of another run (tokens [16, 16, 24] there, now [16, 16, 12])" in refused(SCRIPT, *longer)


def test_a_copy_in_an_empty_folder_runs_without_t5_in_bf16_with_a_cheap_decode(flags, lora_of, tmp_path, monkeypatch):
    copy = tmp_path / "copy" / "my_script.py"
    copy.parent.mkdir()
    shutil.copy(SCRIPT, copy)
    monkeypatch.chdir(copy.parent)
    tiny_sd3(text_encoder_3=None, tokenizer_3=None).save_pretrained(tmp_path / "model")
    tiny_taesd(latent_channels=16).save_pretrained(tmp_path / "taesd")
    options = {"decode": "tiny", "tiny_vae_name_or_path": tmp_path / "taesd", "decode_dtype": "bf16"}
    options |= {"mixed_precision": "bf16", "gradient_checkpointing": True, "max_train_steps": 2}
    options |= {"validation_prompt": "a red wall", "validation_steps": 2, "num_validation_images": 1}
    options |= {"num_inference_steps": 2, "cache_latents": True, "center_crop": True}
    run_script(copy.name, *flags(**options, pretrained_model_name_or_path=tmp_path / "model"))
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in lora_of().values())
    card = (tmp_path / "out/README.md").read_text()
    assert 'model", text_encoder_3=None, tokenizer_3=None)' in card, "as diffusers loads a pipeline without T5"
    assert "the demo's is not at" in refused(copy)


def test_a_distilled_model_is_warned_of_and_trains_without_l_diff(flags, prompts, tmp_path, tiny_sd3_pipeline, caplog):
    turbo = shutil.copytree(tiny_sd3_pipeline, tmp_path / "stable-diffusion-3.5-large-turbo")
    with caplog.at_level(logging.WARNING):
        run_script(SCRIPT, *flags("data", pretrained_model_name_or_path=turbo, max_train_steps=1))
        assert "seems to be distilled to few steps ('turbo' is in its name)" in caplog.text
        caplog.clear()
        options = {"train_prompts": prompts, "train_data_dir": None, "late_start": "rollout", "diffusion_weight": 0}
        options |= {"num_inference_steps": 4, "guidance_scale": 1, "eval_prompts": prompts, "max_train_steps": 1}
        run_script(SCRIPT, *flags("prompts", pretrained_model_name_or_path=turbo, **options))
        assert "distilled" not in caplog.text


def test_another_familys_folder_is_refused_by_the_name_of_its_script(flags, tiny_pipeline, tiny_sdxl_pipeline):
    line = refused(SCRIPT, *flags(pretrained_model_name_or_path=tiny_pipeline))
    assert "it is a StableDiffusionPipeline, for train_acpo_lora_sd.py." in line
    line = refused(SCRIPT, *flags(pretrained_model_name_or_path=tiny_sdxl_pipeline))
    assert "it is a StableDiffusionXLPipeline, for train_acpo_lora_sdxl.py." in line


BAD_INPUT = {
    "window": (
        {"num_inference_steps": 1},
        "1 sampling steps (--num_inference_steps) end at sigma = 1.000, none below --tmax 250 / 1000: take at least 2",
    ),
    "tmax": ({"tmax": 5}, "end at sigma = 0.009, none below --tmax 5 / 1000: take a larger --tmax, which no number"),
    "tokens": ({"max_sequence_length": 513}, "--max_sequence_length: expected at most 512 tokens, found 513"),
    "weights": (
        {"weighting_scheme": "sigma_sqrt", "diffusion_timesteps": "late"},
        "--weighting_scheme sigma_sqrt weighs by 1 / sigma^2",
    ),
    "spread": ({"logit_std": 0}, "--logit_std: expected a number above 0, found 0.0"),
    "resolution": ({"resolution": 34}, "--resolution must be a multiple of 4 for this model, got 34"),
    "positions": ({"resolution": 128}, "--resolution must be at most 64 for this transformer, got 128"),
    "random crops": ({"cache_latents": True}, "--cache_latents needs images and --center_crop"),
    "targets": ({"lora_layers": "attn.to_z"}, "'attn.to_z' matches nothing"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_that_names_it(flags, case):
    changes, expected = BAD_INPUT[case]
    assert expected in refused(SCRIPT, *flags(**changes))
