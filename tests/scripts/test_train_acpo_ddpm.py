"""The real script on a tiny DDPM: from scratch and fine-tuned, what it writes, and that it repeats itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import train_acpo_ddpm as script
from diffusers import DDIMPipeline, DDPMPipeline
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acpo_utils.evaluators import TwoStreamIQA
from tests.launching import EXAMPLES, command_line, fresh_process, launch, refused, run_script
from tests.tiny_images import pictures
from tests.tiny_models import UNET2D_CONFIG, tiny_ddim, tiny_ddpm, tiny_unet2d


SCRIPT = EXAMPLES / "train_acpo_ddpm.py"
DEMO = EXAMPLES / "demo"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Pictures, a DDPM and a DDIM to fine-tune, a configuration to start from, a guide."""
    folder = tmp_path_factory.mktemp("ddpm")
    pictures(folder / "images", 12)
    pictures(folder / "validation", 6)
    tiny_ddpm(folder / "ddpm")
    tiny_ddim(folder / "ddim")
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"} | UNET2D_CONFIG))
    torch.manual_seed(4)
    TwoStreamIQA(widths=(4, 4, 8, 8), fusion_width=8).save_pretrained(folder / "guide")
    return folder


@pytest.fixture
def flags(world, tmp_path):
    def build(output="out", scratch=False, **changes):
        model = {
            "pretrained_model_name_or_path": world / "ddpm",
            "evaluator": f"two-stream:{world / 'guide'}",
            "learning_rate": 1e-3,
        }
        scratch_model = {"model_config_name_or_path": world / "config.json", "resolution": 32, "lr_warmup_steps": 1}
        options = {
            "train_data_dir": world / "images",
            "num_validation_images": 4,
            "num_eval_images": 4,
            "train_batch_size": 2,
            "max_train_steps": 4,
            "sampler": "ddim",
            "ddpm_num_inference_steps": 4,
            "last_steps": 2,
            "report_to": "none",
            "output_dir": tmp_path / output,
        }
        options |= (scratch_model if scratch else model) | changes
        if "tmax" in changes or "full_trajectory" in changes:
            del options["last_steps"]
        return command_line(**options)

    return build


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def predict(unet) -> torch.Tensor:
    return unet(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 600])).sample


def test_the_embedded_demo(tmp_path, monkeypatch, capsys):
    """No model, no data: the shipped DDPM, faces, guide and judges, shortened; what the model card promises is there."""
    monkeypatch.setattr(script, "use_all_cpus", lambda: None)  # tests beside this one use them
    short = {"max_train_steps": 2, "num_eval_images": 4, "ddpm_num_inference_steps": 4, "last_steps": 2}
    short |= {"train_batch_size": 2, "num_validation_images": 8}
    with fresh_process():
        script.main(script.parse_args(command_line(**short, output_dir=tmp_path / "demo")))
    out = capsys.readouterr().out
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert set(metrics["comparisons"]) == {"guide", "MSE (lower is better)"} and "| guide |" in out
    assert set(metrics["sets"]) == {"KID on EfficientNet-Lite features", "diversity (shift-tolerant LPIPS)"}
    assert metrics["comparisons"]["guide"]["finetuned_mean"] != metrics["comparisons"]["guide"]["base_mean"]
    assert (tmp_path / "demo" / "comparison.png").stat().st_size > 10_000
    DDIMPipeline.from_pretrained(tmp_path / "demo")


def test_from_scratch(flags, world, tmp_path):
    """Checkpoints, moving average, sheets of samples, a DDPM in fp16 with its numbers; no guide is ever named.

    By `accelerate launch`, as docs/unconditional.md has it; the other tests run the script in this process.
    """
    options = flags(
        scratch=True,
        sampler=None,
        last_steps=None,
        use_ema=True,
        weight_dtype="fp16",
        random_flip=True,
        center_crop=True,
        checkpointing_steps=1,
        checkpoints_total_limit=2,
        save_images_epochs=1,
        train_batch_size=4,
        eval_batch_size=4,
    )
    out = launch(SCRIPT, *options)
    folder = tmp_path / "out"
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    assert (folder / "samples.png").is_file() and (folder / "samples" / "step-2.png").is_file()
    pipeline = DDPMPipeline.from_pretrained(folder)
    assert type(pipeline) is DDPMPipeline and pipeline.unet.config.sample_size == 32
    average = load_file(folder / "checkpoint-4" / "ema.safetensors")
    averages = [average[f"shadow_params.{i}"] for i in range(len(average) - 1)]
    stored, names = weights(folder), [name for name, _ in pipeline.unet.named_parameters()]
    assert all(torch.equal(stored[name], tensor.half()) for name, tensor in zip(names, averages, strict=True))
    assert not equal(
        stored, {n: t.half() for n, t in load_file(folder / "checkpoint-4" / "model.safetensors").items()}
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["summary"].keys() == {"MSE (lower is better)"} and metrics["skipped_steps"] == 0
    mse = metrics["summary"]["MSE (lower is better)"]
    assert mse["n"] == 4 and 0.5 < mse["mean"] < 2 and f"{mse['mean']:.4f}" in out
    card = (folder / "README.md").read_text()
    assert "none, trained from scratch" in card and "DiffusionPipeline.from_pretrained" in card
    settings = json.loads((folder / "args.json").read_text())
    assert settings["lr_scheduler"] == "cosine" and settings["adam_beta1"] == 0.95 and settings["quality_weight"] == 0


def test_lora(flags, world, tmp_path):
    """The pipeline has the LoRA in it; loaded or fused on the base, the LoRA's own files give the same model."""
    options = flags(
        rank=3,
        lora_alpha=6,
        judge=f"two-stream:{world / 'guide'}",
        learning_rate=1e-2,
        validation_data_dir=world / "validation",
        report_to="tensorboard",
        late_start="rollout",
    )
    out = run_script(SCRIPT, *options)
    folder = tmp_path / "out"
    assert (folder / "comparison.png").stat().st_size > 5000 and list((folder / "logs").glob("*/events*"))
    fused = DDIMPipeline.from_pretrained(folder).unet
    base = tiny_unet2d()
    assert not torch.allclose(predict(fused), predict(base), atol=1e-3)
    loaded = PeftModel.from_pretrained(tiny_unet2d(), folder / "lora")
    assert loaded.peft_config["default"].r == 3 and loaded.peft_config["default"].lora_alpha == 6
    assert torch.allclose(predict(loaded), predict(fused), atol=1e-5)
    assert torch.allclose(predict(loaded.merge_and_unload()), predict(fused), atol=1e-6)

    metrics = json.loads((folder / "metrics.json").read_text())
    guide, judge, mse = metrics["comparisons"].values()
    assert list(metrics["comparisons"])[0] == "guide" and metrics["num_images"] == 4
    assert guide["base_mean"] == pytest.approx(judge["base_mean"]), "the judge is the guide here"
    assert 0 < guide["base_mean"] < 100 and guide["base_mean"] != guide["finetuned_mean"]
    lower = {1.0: mse["mean_difference"] < 0, 0.0: mse["mean_difference"] > 0}
    assert lower.get(mse["win_rate"], True), "a win is a lower error"
    card = (folder / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base.unet, "out/lora")' in card and "t < 500" in out


RUNS = {
    "from scratch": {"scratch": True, "use_ema": True, "dataloader_num_workers": 1, "last_steps": None},
    "lora": {"use_ema": True, "lr_scheduler": "cosine"},
    "all weights": {"rank": 0, "late_start": "rollout", "late_steps": 2, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("kind", RUNS)
def test_resume_equals_the_uninterrupted_run_bit_for_bit(flags, tmp_path, kind):
    options = {"gradient_accumulation_steps": 2, "random_flip": True, "train_batch_size": 1, "checkpointing_steps": 2}
    options |= {"num_eval_images": 0} | RUNS[kind]
    run_script(SCRIPT, *flags("whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run_script(SCRIPT, *flags("resumed", resume_from_checkpoint="latest", **options))
    whole, resumed = (tmp_path / name for name in ("whole", "resumed"))
    assert equal(weights(whole), weights(resumed)) and not equal(weights(whole), tiny_unet2d().state_dict())
    files = sorted(path.name for path in (whole / "checkpoint-4").glob("*.safetensors"))
    assert (
        files
        == {
            "from scratch": ["ema.safetensors", "model.safetensors"],
            "lora": ["adapter_model.safetensors", "ema.safetensors"],
            "all weights": ["model.safetensors"],
        }[kind]
    )
    for name in files:
        assert equal(load_file(whole / "checkpoint-4" / name), load_file(resumed / "checkpoint-4" / name)), name
    states = [torch.load(n / "checkpoint-4" / "optimizer.bin", weights_only=True) for n in (whole, resumed)]
    for first, second in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_all_weights_of_a_ddim_against_their_frozen_copy(flags, world, tmp_path):
    """The whole trajectory, a chain, a guide that is strong: base and fine-tuned differ, and the base is untouched."""
    model = {"pretrained_model_name_or_path": world / "ddim", "rank": 0, "sampler": None}
    out = run_script(SCRIPT, *flags(**model, full_trajectory=True, late_steps=3))
    assert type(DDIMPipeline.from_pretrained(tmp_path / "out")) is DDIMPipeline
    assert not (tmp_path / "out" / "lora").exists()
    base = tiny_unet2d().state_dict()
    moved = [name for name, tensor in weights(tmp_path / "out").items() if not torch.equal(tensor, base[name])]
    assert len(moved) == len(base), "every weight has moved"
    comparisons = json.loads((tmp_path / "out" / "metrics.json").read_text())["comparisons"]
    assert comparisons["MSE (lower is better)"]["mean_difference"] != 0 and "| guide |" in out
    assert equal(weights(world / "ddim"), base)


@pytest.mark.parametrize("rank", [2, 0])
def test_the_anchor_starts_at_exactly_zero_in_mixed_precision(flags, tmp_path, rank):
    """Base and student see the same autocast, be the base the LoRA's own or a frozen copy."""
    run_script(
        SCRIPT,
        *flags(rank=rank, mixed_precision="bf16", report_to="tensorboard", max_train_steps=2, num_eval_images=4),
    )
    (events,) = (tmp_path / "out" / "logs").glob("*/events*")
    first, second = (event.value for event in EventAccumulator(str(events)).Reload().Scalars("loss_anchor"))
    assert first == 0 and second > 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0])
def test_two_processes_resume_exactly(flags, tmp_path, rank):
    options = {"max_train_steps": 2, "checkpointing_steps": 1, "train_batch_size": 1, "num_eval_images": 0}
    options |= {"rank": rank, "use_ema": True, "late_start": "rollout", "late_steps": 2, "save_images_epochs": 1}
    launch(SCRIPT, *flags("whole", **options), num_processes=2)
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    launch(SCRIPT, *flags("resumed", resume_from_checkpoint="latest", **options), num_processes=2)
    for name in ("random_states_0.pkl", "random_states_1.pkl"):
        assert (tmp_path / "resumed" / "checkpoint-2" / name).is_file()
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))


def test_what_was_trained_from_scratch_can_be_fine_tuned(flags, tmp_path):
    """The two uses of the script, one after the other; a U-Net alone takes its schedule from the flags."""
    run_script(
        SCRIPT, *flags("scratch", scratch=True, last_steps=None, prediction_type="v_prediction", num_eval_images=0)
    )
    run_script(
        SCRIPT,
        *flags("tuned", pretrained_model_name_or_path=tmp_path / "scratch", max_train_steps=1, num_eval_images=0),
    )
    scheduler = json.loads((tmp_path / "tuned" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    alone = {"pretrained_model_name_or_path": tmp_path / "scratch" / "unet", "prediction_type": "v_prediction"}
    run_script(SCRIPT, *flags("alone", max_train_steps=1, num_eval_images=0, **alone))
    assert equal(weights(tmp_path / "tuned"), weights(tmp_path / "alone"))


def test_epochs_from_scratch_and_steps_with_a_model(flags, tmp_path):
    """12 pictures, 4 held out, batches of 3: an epoch is three steps."""
    options = {"scratch": True, "last_steps": None, "max_train_steps": None, "num_eval_images": 0}
    run_script(SCRIPT, *flags(num_epochs=2, checkpointing_steps=1, train_batch_size=3, save_model_epochs=1, **options))
    assert max(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == "checkpoint-6"


def test_defaults_of_the_three_uses():
    args, demo = script.parse_args([]), json.loads((DEMO / "acpo_ddpm.json").read_text())
    assert args.demo and not args.scratch
    for name, value in demo.items():
        assert getattr(args, name) == json.loads(json.dumps(value).replace("$DEMO", str(DEMO))), name
    args = script.parse_args(["--evaluator", "pickscore", "--judge", "kid", "--tmax", "7"])
    assert args.evaluator == ["pickscore"] and args.judge == ["kid"] and (args.tmax, args.last_steps) == (7, None)
    args = script.parse_args(["--train_data_dir", "x"])
    assert args.scratch and not args.demo
    assert all(getattr(args, name) == value for name, value in script.SCRATCH_SETTINGS.items())
    args = script.parse_args(["--train_data_dir", "x", "--learning_rate", "5e-4", "--logger", "wandb"])
    assert args.learning_rate == 5e-4 and args.report_to == "wandb"
    both = ["--train_data_dir", "x", "--pretrained_model_name_or_path", "y", "--evaluator", "z"]
    args = script.parse_args(both)
    assert not args.scratch and not args.demo
    assert (args.max_train_steps, args.learning_rate, args.last_steps, args.anchor_weight) == (1000, 2e-5, 10, 1)


def test_what_is_named_takes_the_place_of_the_demos_settings_even_where_it_is_the_scripts_default():
    demo = json.loads((DEMO / "acpo_ddpm.json").read_text())
    assert demo["late_start"] == "rollout" and script.parse_args(["--late_start", "data"]).late_start == "data"
    assert demo["quality_weight"] != 1 and script.parse_args(["--quality_weight", "1"]).quality_weight == 1
    assert script.parse_args(["--evaluator", "a", "b"]) == script.parse_args(["--evaluator", "a", "--evaluator", "b"])
    assert script.parse_args(["--judge", "a", "b"]) == script.parse_args(["--judge", "a", "--judge", "b"])
    assert script.parse_args(["--evaluator", "a", "b"]).evaluator_weight == [0.5, 0.5]


FINE_TUNE = {
    "missing data": ({"train_data_dir": "no/such/folder"}, "no/such/folder"),
    "no data": ({"train_data_dir": None}, "need one of --dataset_name and --train_data_dir"),
    "unknown column": ({"image_column": "picture"}, "--image_column picture"),
    "missing validation": ({"validation_data_dir": "no/such"}, "--validation_data_dir no/such: expected a folder"),
    "nothing left": ({"num_validation_images": 12}, "12 of 12 images leaves none to train on"),
    "few to compare": ({"num_eval_images": 1}, "expected 0 or at least 4"),
    "tmax": ({"tmax": 1001}, "--tmax must be in 1..1000"),
    "last steps": ({"last_steps": 5}, "--last_steps must be in 1..4"),
    "sampling steps": ({"ddpm_num_inference_steps": 1001}, "--ddpm_num_inference_steps must be in 1..1000"),
    "both windows": ({"tmax": 10, "full_trajectory": True}, "not allowed with argument"),
    "resolution": ({"resolution": 64}, "--resolution 64: the model draws 32 px"),
    "no evaluator": ({"evaluator": None}, "needs an --evaluator"),
    "missing evaluator": ({"evaluator": "two-stream:no/such/guide"}, "no/such/guide"),
    "unknown judge": ({"judge": "fid"}, "fid"),
    "kid of nothing": ({"judge": "kid", "num_validation_images": 0}, "--judge kid compares with held-out images"),
    "model": ({"pretrained_model_name_or_path": "no/such/model"}, "expected a DDPMPipeline or DDIMPipeline"),
    "layers": ({"lora_target_modules": "to_nowhere"}, "--lora_target_modules: expected names of layers"),
    "checkpoint": ({"resume_from_checkpoint": "checkpoint-9"}, "checkpoint-9"),
    "output folder": ({"output_dir": "/proc/acpo"}, "/proc/acpo cannot be written to"),
    "late diffusion": ({"late_start": "rollout", "diffusion_timesteps": "late"}, "--late_start data"),
    "backprop": ({"late_steps": 2, "late_backprop_steps": 3}, "--late_backprop_steps"),
    "weights": (
        {"quality_weight": 0, "anchor_weight": 0, "diffusion_weight": 0},
        "--diffusion_weight must be above 0",
    ),
    "config of a model": ({"model_config_name_or_path": "x.json"}, "is for training from scratch"),
}
SCRATCH = {
    "anchor": ({"anchor_weight": 1}, "need a base model"),
    "rank": ({"rank": 4}, "need a base model"),
    "configuration": ({"model_config_name_or_path": "no/such.json"}, "no/such.json"),
    "multiple": ({"resolution": 33}, "--resolution must be a multiple of 2"),
}


@pytest.mark.parametrize("case", [*FINE_TUNE, *SCRATCH])
def test_bad_input_is_one_line_that_names_it(flags, case):
    changes, expected = (FINE_TUNE | SCRATCH)[case]
    out = refused(SCRIPT, *flags(scratch=case in SCRATCH, **changes))
    assert expected in out and "\n" not in out.strip().split("error: ")[-1]


def test_a_corrupt_image_is_named_and_can_be_skipped(flags, tmp_path):
    folder = Path(pictures(tmp_path / "pictures", 8))
    whole = (folder / "02.png").read_bytes()
    (folder / "02.png").write_bytes(whole[: len(whole) // 2])
    assert "02.png" in refused(SCRIPT, *flags(train_data_dir=folder))
    run_script(SCRIPT, *flags(train_data_dir=folder, skip_bad_images=True, max_train_steps=1, num_eval_images=0))


def test_a_checkpoint_of_another_model_is_refused(flags, world, tmp_path):
    """By its settings, and, where these are the same, by what it holds."""
    once = {"max_train_steps": 1, "checkpointing_steps": 1, "num_eval_images": 0}
    resumed = once | {"resume_from_checkpoint": "latest"}
    run_script(SCRIPT, *flags("all weights", rank=0, **once))
    assert "checkpoint-1 is of a run with --rank 0 (now 4)" in refused(SCRIPT, *flags("all weights", **resumed))
    run_script(SCRIPT, *flags("lora", **once))
    weights_file = tmp_path / "lora" / "checkpoint-1" / "adapter_model.safetensors"
    weights_file.rename(weights_file.with_name("model.safetensors"))
    assert "expected a folder with adapter_config.json" in refused(SCRIPT, *flags("lora", **resumed))
    config = tmp_path / "config.json"
    shutil.copy(world / "config.json", config)
    new = {"scratch": True, "model_config_name_or_path": config, "last_steps": None}
    run_script(SCRIPT, *flags("wide", **once, **new))
    config.write_text(json.dumps({"_class_name": "UNet2DModel"} | UNET2D_CONFIG | {"block_out_channels": (8, 24)}))
    assert "checkpoint-1 is of another model" in refused(SCRIPT, *flags("wide", **resumed, **new))


def test_zero_means_never(flags, tmp_path):
    """8 pictures to train on in batches of 4: an epoch is two steps. With 1 all of it would be there."""
    options = {"scratch": True, "last_steps": None, "train_batch_size": 4, "num_eval_images": 0}
    made = {}
    for every in (0, 1):
        names = ("checkpointing_steps", "save_images_epochs", "save_model_epochs", "balance_steps")
        out = run_script(SCRIPT, *flags(f"every {every}", **options, **dict.fromkeys(names, every)))
        made[every] = {path.name for path in (tmp_path / f"every {every}").iterdir()}
        assert ("shares of the gradient" in out) == bool(every)
    assert made[1] - made[0] == {"samples"} | {f"checkpoint-{step}" for step in (1, 2, 3, 4)}
    assert made[0] == {".lock", "args.json", "model_index.json", "README.md", "scheduler", "unet"}


def test_ten_steps_that_are_not_finite_end_the_run(flags, tmp_path):
    options = {"evaluator": "python:tests.guides:breaks_after_the_contract_check", "max_train_steps": 12}
    out = refused(SCRIPT, *flags(checkpointing_steps=5, checkpoints_total_limit=1, **options))
    assert "not finite in ten steps in a row, up to step 10" in out
    saved = load_file(tmp_path / "out" / "checkpoint-5" / "adapter_model.safetensors")
    assert all(w.isfinite().all() and (w == 0).all() == ("lora_B" in name) for name, w in saved.items())
