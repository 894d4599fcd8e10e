"""The real script on tiny models: what it writes, that it repeats itself, what it refuses."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
import train_acpo_lora_sd as script
from accelerate import PartialState
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acpo_utils.evaluators import TwoStreamIQA
from acpo_utils.lora import LORA_NAME, load_lora, save_lora
from tests.launching import EXAMPLES, fresh_process, launch, refused, run_script
from tests.tiny_models import tiny_taesd, tiny_unet


SCRIPT = EXAMPLES / "train_acpo_lora_sd.py"
DEMO = EXAMPLES / "demo"


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red wall\na blue wall\n")
    return tmp_path / "prompts.txt"


def test_outputs_checkpoints_and_comparison(sd_flags, lora_of, tmp_path, tiny_pipeline, captioned_images):
    """By the README's `accelerate launch`; the other tests run the script in this process."""
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2"]
    flags = sd_flags(
        checkpointing_steps=1,
        checkpoints_total_limit=2,
        eval_prompts=f"{captioned_images}/train.parquet",  # with real images
        num_eval_prompts=3,
        num_inference_steps=2,
        validation_prompt="a red wall",
        validation_steps=2,
        num_validation_images=2,
        rank=3,
        lora_alpha=6,
        lora_target_modules=",".join(targets),
    )
    out = launch(SCRIPT, *flags)
    folder = tmp_path / "out"
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    assert (folder / "comparison.png").stat().st_size > 5000 and (folder / "validation" / "step-2.png").is_file()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["num_prompts"] == 3 and metrics["skipped_steps"] == 0
    guide = metrics["comparisons"]["guide"]
    assert 0 < guide["base_mean"] < 5 and f"{guide['finetuned_mean']:.4f}" in out
    assert metrics["sets"]["drift"][0] > 0 and f"{metrics['sets']['drift'][0]:.3g}" in out
    card = (folder / "README.md").read_text()
    assert "acpo" in card and metrics["panel"]["pixel-mse"]["n"] == 3 and "| pixel-mse ↓ |" in card

    weights = lora_of()
    assert all(name.startswith("unet.") and "lora" in name for name in weights)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert any("proj_in" in name for name in weights) and all(w.abs().sum() > 0 for w in weights.values())

    # A stock pipeline loads the file, its output changes, and it predicts what the trained model predicted.
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor(50), torch.randn(1, 16, 32)
    with torch.no_grad():
        before = pipeline.unet(*inputs).sample
        pipeline.load_lora_weights(folder, weight_name=LORA_NAME)
        after = pipeline.unet(*inputs).sample
        trained = tiny_unet()
        trained.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
        load_lora(trained, folder)
        assert not torch.allclose(before, after)
        assert torch.allclose(after, trained(*inputs).sample, atol=1e-6)


def test_resume_equals_the_uninterrupted_run_bit_for_bit(sd_flags, lora_of, tmp_path):
    options = {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "random_flip": True, "train_batch_size": 1}
    run_script(SCRIPT, *sd_flags("whole", checkpointing_steps=2, **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run_script(SCRIPT, *sd_flags("resumed", checkpointing_steps=2, resume_from_checkpoint="latest", **options))
    whole, resumed = lora_of("whole"), lora_of("resumed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    states = [
        torch.load(tmp_path / n / "checkpoint-4" / "optimizer.bin", weights_only=True) for n in ("whole", "resumed")
    ]
    for first, second in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_copy_in_an_empty_folder_runs_and_weights_of_zero_are_a_plain_lora_run(sd_flags, tmp_path, monkeypatch):
    """No evaluator is named: with both weights at 0 nothing may be decoded or scored."""
    copy = tmp_path / "copy" / "my_script.py"
    copy.parent.mkdir()
    shutil.copy(SCRIPT, copy)
    monkeypatch.chdir(copy.parent)
    run_script(copy.name, *sd_flags(evaluator=None, quality_weight=0, anchor_weight=0))
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert f"the demo's is not at {copy.parent / 'demo'}: clone the repository" in refused(copy)


def test_the_clean_share_grows_over_the_run(sd_flags, tmp_path, monkeypatch):
    shares, step = [], script.training_step

    def watched(*inputs):
        shares.append(inputs[-1].guide_clean_weight)
        return step(*inputs)

    monkeypatch.setattr(script, "training_step", watched)
    growing = {"guide_perturbation": 2, "guide_clean_weight": 0.2, "guide_clean_weight_end": 0.8}
    with fresh_process():
        script.main(script.parse_args(sd_flags(max_train_steps=3, **growing)))
    assert shares == pytest.approx([0.2, 0.5, 0.8])
    assert json.loads((tmp_path / "out" / "args.json").read_text())["guide_clean_weight"] == 0.2


def test_between_the_late_steps_there_is_the_diffusion_loss_alone(sd_flags, monkeypatch, caplog):
    logged = []
    step = script.training_step

    def watched(*inputs):
        loss, terms = step(*inputs)
        logged.append(set(terms))
        return loss, terms

    monkeypatch.setattr(script, "training_step", watched)
    flags = {"late_every": 2, "late_start": "rollout", "num_inference_steps": 12, "guidance_scale": 2}
    with fresh_process():
        script.main(script.parse_args(sd_flags(max_train_steps=4, balance_steps=1, **flags)))
    logged = logged[-4:]  # the estimate takes a step too
    assert logged[0] == logged[2] == {"loss", "loss_diffusion"}
    assert logged[1] == logged[3] > {"loss_anchor", "loss_quality", "score"}
    shares = [record.message for record in caplog.records if "shares of the gradient" in record.message]
    assert len(shares) == 2 and "step 2:" in shares[0] and "step 4:" in shares[1]


def test_the_baseline_is_scored_by_the_guide_that_did_not_train_it(sd_flags, prompts, tmp_path):
    options = {"quality_weight": 0, "anchor_weight": 0, "max_train_steps": 1, "num_inference_steps": 2}
    run_script(SCRIPT, *sd_flags(**options, eval_prompts=prompts))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["comparisons"]["guide"]["n"] == 2 and metrics["sets"]["drift"][0] > 0


def test_rollout_chain_late_diffusion_and_continuing_from_a_lora(sd_flags, lora_of, prompts, tmp_path):
    first_flags = sd_flags(
        "first",
        decode_batch_size=1,
        diffusion_timesteps="late",
        late_steps=3,
        late_backprop_steps=1,
        gradient_checkpointing=True,
        rank=2,
    )
    run_script(SCRIPT, *first_flags)
    second_flags = sd_flags(
        "second",
        train_data_dir=None,
        train_prompts=prompts,
        late_start="rollout",
        tmax=300,
        num_inference_steps=5,
        guidance_scale=2,
        max_train_steps=1,
        lora_path=tmp_path / "first",
        diffusion_weight=0,
    )
    run_script(SCRIPT, *second_flags)
    first, second = lora_of("first"), lora_of("second")
    assert {n: w.shape for n, w in first.items()} == {n: w.shape for n, w in second.items()}
    moved = max((first[name] - second[name]).abs().max().item() for name in first)
    assert 0 < moved < 2e-3, "one Adam step of 1e-3 from the saved LoRA, not from a new one"


def test_mixed_precision_trains_samples_and_compares(sd_flags, lora_of, prompts, tmp_path, tiny_guide):
    options = {"mixed_precision": "bf16", "eval_prompts": prompts, "num_inference_steps": 2}
    options |= {"validation_steps": 2, "judge": f"ipce:{tiny_guide}", "validation_prompt": "a red wall"}
    run_script(SCRIPT, *sd_flags(**options, max_train_steps=3, num_validation_images=1))
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in lora_of().values())
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["comparisons"]
    assert rows["guide"]["n"] == 2 and rows["guide"]["mean_difference"] != 0
    assert (tmp_path / "out" / "validation" / "base-beside-step-2.png").is_file()


@pytest.mark.slow
def test_compiled_training_is_the_same_but_for_rounding(sd_flags, lora_of):
    for name, compiled in (("plain", None), ("compiled", True)):
        options = {"max_train_steps": 2, "validation_steps": 1, "num_validation_images": 1, "balance_steps": 1}
        launch(SCRIPT, *sd_flags(name, torch_compile=compiled, **options))
    plain, compiled = lora_of("plain"), lora_of("compiled")
    assert plain.keys() == compiled.keys()
    assert any(not torch.equal(plain[name], compiled[name]) for name in plain), "nothing was compiled"
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=0.05, atol=2e-4)  # two steps of 1e-3 by Adam


def test_two_guides_with_weights(sd_flags, prompts, tmp_path, tiny_guide):
    """The weighted mean guides; each guide's score is logged and has its row in the table, on its own scale."""
    torch.manual_seed(4)
    TwoStreamIQA(widths=(4, 4, 8, 8), fusion_width=8).save_pretrained(tmp_path / "quality")
    specs = [f"ipce:{tiny_guide}", f"two-stream:{tmp_path / 'quality'}"]
    flags = sd_flags(
        evaluator=specs,
        evaluator_weight=[1.4, 0.6],
        max_train_steps=2,
        report_to="tensorboard",
        balance_steps=2,
        eval_prompts=prompts,
        num_inference_steps=2,
    )
    out = run_script(SCRIPT, *flags)
    settings = json.loads((tmp_path / "out" / "args.json").read_text())
    assert settings["evaluator"] == specs and settings["evaluator_weight"] == pytest.approx([0.7, 0.3])
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["comparisons"]
    assert list(rows) == ["guide", "guide 0.7 ipce-guide", "guide 0.3 two-stream-quality"]
    weighted, ipce, two_stream = (row["base_mean"] for row in rows.values())
    assert weighted == pytest.approx(0.7 * ipce / 5 + 0.3 * two_stream / 100, abs=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("guide 0.3 two-stream-quality", ", ".join(specs)):
        assert text in card
    assert "| guide 0.7 ipce-guide |" in out
    (events,) = (tmp_path / "out" / "logs").glob("*/events*")
    log = EventAccumulator(str(events)).Reload()
    score, *parts = (log.Scalars(tag)[0].value for tag in ("score", "score_ipce-guide", "score_two-stream-quality"))
    assert score == pytest.approx(0.7 * parts[0] + 0.3 * parts[1], abs=1e-5)
    shares = [log.Scalars(f"balance/loss_{name}_share") for name in ("diffusion", "anchor", "quality")]
    assert [share.step for (share,) in shares] == [2, 2, 2]
    assert sum(share.value for (share,) in shares) == pytest.approx(1.0)
    assert all(share.value > 0 for (share,) in shares)
    assert any(tag.startswith("balance/quality_grad_norm_t_") for tag in log.Tags()["scalars"])


def test_the_demos_own_guide_gives_way_to_a_named_one():
    def parse(*flags):
        args = script.parse_args(flags)
        return args.evaluator, args.evaluator_weight

    assert parse() == ([f"ipce:{DEMO / 'guide'}"], [1.0])
    assert parse("--evaluator", "pickscore") == (["pickscore"], [1.0])
    assert parse("--evaluator", "a", "--evaluator", "b") == (["a", "b"], [0.5, 0.5])
    both = ("--evaluator", "a", "--evaluator_weight", "3", "--evaluator", "b", "--evaluator_weight", "1")
    assert parse(*both) == (["a", "b"], [0.75, 0.25])
    assert parse("--evaluator", "a", "b", "--evaluator_weight", "3", "1") == parse(*both)
    assert script.parse_args(["--judge", "a", "b"]) == script.parse_args(["--judge", "a", "--judge", "b"])
    assert script.parse_args(["--judge", "a"]).judge == ["a"]


def test_the_demos_settings_give_way_to_what_is_named_even_where_it_is_the_scripts_default():
    file = json.loads((DEMO / "acpo_lora_sd.json").read_text())
    args = script.parse_args([])
    assert args.demo and args.pretrained_model_name_or_path == str(DEMO / "pipeline")
    for name, value in file.items():
        assert getattr(args, name) == json.loads(json.dumps(value).replace("$DEMO", str(DEMO))), name
    assert file["late_start"] == "rollout" and script.parse_args(["--late_start", "data"]).late_start == "data"
    assert file["quality_weight"] != 0.1 and script.parse_args(["--quality_weight", "0.1"]).quality_weight == 0.1
    named = script.parse_args(["--pretrained_model_name_or_path", "x", "--train_data_dir", "y", "--evaluator", "z"])
    assert not named.demo and (named.late_start, named.quality_weight, named.judge) == ("data", 0.1, None)


def test_other_decoders_train_too_and_leave_the_final_comparison_to_the_vae(sd_flags, lora_of, tmp_path):
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    others = {
        "crop": {"decode": "crop", "decode_size": 16},
        "tiny": {"decode": "tiny", "tiny_vae_name_or_path": tmp_path / "taesd", "gradient_checkpointing": True},
        "straight_through": {"decode": "straight_through", "decode_dtype": "bf16", "gradient_checkpointing": True},
    }
    run_script(SCRIPT, *sd_flags("full", max_train_steps=2))
    for name, options in others.items():
        run_script(SCRIPT, *sd_flags(name, max_train_steps=2, **options))
        full, other = lora_of("full"), lora_of(name)
        assert any(not torch.equal(full[key], other[key]) for key in full)
    tiny_taesd(latent_channels=8).save_pretrained(tmp_path / "other")
    options = {"decode": "tiny", "tiny_vae_name_or_path": tmp_path / "other"}
    assert "expected 4 latent_channels as the VAE has, found 8" in refused(SCRIPT, *sd_flags(**options))


BAD_INPUT = {
    "decode": ({"decode": "crop"}, "--decode crop goes with --decode_size"),
    "straight through": (
        {"decode": "straight_through"},
        "--decode straight_through needs what its gradient goes through",
    ),
    "decode batch": ({"decode_batch_size": 0}, "--decode_batch_size: expected at least 1, found 0"),
    "window": (
        {"decode": "crop", "decode_size": 15},
        "--decode_size must be a multiple of 2 up to the resolution, got 15",
    ),
    "tiny": ({"decode": "tiny", "tiny_vae_name_or_path": "no/such/vae"}, "expected an AutoencoderTiny"),
    "missing data": ({"train_data_dir": "no/such/folder"}, "no/such/folder"),
    "unknown column": ({"caption_column": "caption"}, "caption"),
    "tmax": ({"tmax": 1001}, "--tmax must be in 1..1000"),
    "resolution": ({"resolution": 33}, "--resolution must be a multiple of"),
    "missing evaluator": ({"evaluator": "ipce:no/such/guide"}, "no/such/guide"),
    "kind of evaluator": ({"evaluator": "fid:x"}, "fid:x"),
    "one weight for two": ({"evaluator": ["a", "b"], "evaluator_weight": 1}, "one for each evaluator, found 1 for 2"),
    "weight of 0": (
        {"evaluator": ["a", "b"], "evaluator_weight": [1, 0]},
        "--evaluator_weight: expected weights above 0",
    ),
    "weight alone": ({"evaluator": None, "evaluator_weight": 1, "quality_weight": 0}, "found 1 for 0"),
    "model": ({"pretrained_model_name_or_path": "no/such/model"}, "expected a Stable Diffusion pipeline"),
    "checkpoint": ({"resume_from_checkpoint": "checkpoint-9"}, "checkpoint-9"),
    "output folder": ({"output_dir": "/proc/acpo"}, "/proc/acpo cannot be written to"),
    "flags": ({"late_start": "rollout", "diffusion_timesteps": "late"}, "--late_start data"),
    "two sources": ({"train_prompts": "x.txt"}, "need one of --dataset_name, --train_data_dir and --train_prompts"),
    "no images": ({"train_data_dir": None, "train_prompts": "x.txt"}, "it needs --late_start rollout and"),
    "random crops": ({"cache_latents": True}, "--cache_latents needs images and --center_crop"),
    "budget": ({"anchor_budget": 0.1, "anchor_weight": 0}, "--anchor_budget needs an --anchor_weight above 0"),
    "steps": ({"max_train_steps": 0}, "--max_train_steps: expected at least 1, found 0"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_that_names_it(sd_flags, case):
    changes, expected = BAD_INPUT[case]
    assert expected in refused(SCRIPT, *sd_flags(**changes))


def test_ten_steps_that_are_not_finite_end_the_run_and_keep_the_checkpoint(sd_flags, tmp_path):
    options = {"evaluator": "python:tests.guides:breaks_after_the_contract_check", "max_train_steps": 12}
    out = refused(SCRIPT, *sd_flags(checkpointing_steps=5, checkpoints_total_limit=1, **options))
    assert "not finite in ten steps in a row, up to step 10" in out
    # Every step was skipped: the checkpoint of step 5 holds the LoRA as it was initialised, lora_B at zero.
    saved = load_file(tmp_path / "out" / "checkpoint-5" / "pytorch_lora_weights.safetensors")
    assert all(w.isfinite().all() and (w == 0).all() == ("lora_B" in name) for name, w in saved.items())


def test_the_gradient_is_clipped_before_the_optimizer_sees_it(sd_flags, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def recording_step(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording_step)
    run_script(SCRIPT, *sd_flags("free", max_train_steps=2))
    run_script(SCRIPT, *sd_flags("clipped", max_train_steps=2, max_grad_norm=1e-5))
    assert min(norms[:2]) > 2e-5, "without a limit that bites the norm is larger"
    assert norms[2:] == pytest.approx([1e-5, 1e-5], rel=0.1)


def test_an_unreadable_image_is_named_and_can_be_skipped(sd_flags, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    assert "2.png" in refused(SCRIPT, *sd_flags(train_data_dir=folder))
    run_script(SCRIPT, *sd_flags(train_data_dir=folder, skip_bad_images=True, max_train_steps=1))


def test_a_lora_of_another_model_is_refused(sd_flags, tmp_path):
    other = tiny_unet(block_out_channels=(8, 32))
    other.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    (tmp_path / "other").mkdir()
    save_lora(other, tmp_path / "other")
    assert "another model" in refused(SCRIPT, *sd_flags(lora_path=tmp_path / "other"))


def test_zero_means_never(sd_flags, prompts, tmp_path):
    """Of checkpoints, validation and the gradient's balance; with 1 all of them would be there."""
    options = {"validation_prompt": "a red wall", "eval_prompts": prompts, "num_inference_steps": 2}
    options |= {"max_train_steps": 2, "num_validation_images": 2}
    made = {}
    for every in (0, 1):
        steps = dict.fromkeys(("checkpointing_steps", "validation_steps", "balance_steps"), every)
        out = run_script(SCRIPT, *sd_flags(f"every {every}", **options, **steps))
        made[every] = {path.name for path in (tmp_path / f"every {every}").iterdir()}
        assert ("shares of the gradient" in out) == bool(every)
    assert made[1] - made[0] == {"checkpoint-1", "checkpoint-2", "validation"}
    results = {"args.json", "comparison.png", "metrics.json", "pytorch_lora_weights.safetensors", "README.md"}
    assert made[0] == results | {".lock"}


def test_a_run_of_one_prompt_begins(sd_flags, tmp_path):
    """The guide's check has two images at other times."""
    (tmp_path / "prompt.txt").write_text("a red wall\n")
    options = {"train_prompts": tmp_path / "prompt.txt", "train_data_dir": None, "late_start": "rollout"}
    options |= {"diffusion_weight": 0, "num_inference_steps": 5, "tmax": 300, "guidance_scale": 1}
    run_script(SCRIPT, *sd_flags(**options, max_train_steps=1, train_batch_size=1))
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_a_distilled_model_is_warned_of_if_l_diff_is_on(sd_flags, tmp_path, tiny_pipeline, caplog):
    """By its card: SD-Turbo's own name may be gone from a folder."""
    folder = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    (folder / "README.md").write_text("---\nbase_model: stabilityai/sd-turbo\n---\n")
    with fresh_process(), caplog.at_level(logging.WARNING):
        PartialState(cpu=True)  # which the logger asks for
        options = {"pretrained_model_name_or_path": folder}
        script.load_models(script.parse_args(sd_flags(**options)), torch.float32, "cpu")
        assert "seems to be distilled to few steps ('turbo' is in its card's base_model), and L_diff" in caplog.text
        caplog.clear()
        script.load_models(script.parse_args(sd_flags(diffusion_weight=0, **options)), torch.float32, "cpu")
        assert "distilled" not in caplog.text
