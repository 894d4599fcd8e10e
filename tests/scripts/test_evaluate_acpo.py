"""The real script on tiny models: same noise, what is kept and what is made again, every file that it writes."""

import csv
import json
import shutil
from pathlib import Path

import evaluate_acpo as script
import numpy as np
import pytest
import torch
from PIL import Image

from acpo_utils.evaluation import models
from acpo_utils.evaluation.panel import PANEL
from acpo_utils.evaluation.real_images import read_real_images
from acpo_utils.evaluation.real_pairs import ssim
from acpo_utils.randomness import step_generator
from tests.launching import EXAMPLES, command_line, launch, refused, run_script


SCRIPT = EXAMPLES / "evaluate_acpo.py"
PROMPTS = ["a red wall", "a blue wall", "a green | wall", 'a "yellow" wall', "two walls"]


def redness(images, prompts=None):
    """A metric for `python:tests.scripts.test_evaluate_acpo:redness`."""
    return images[:, 0].mean((1, 2)).clamp(0.001, 0.999)


def breaks(images, prompts=None):
    return redness(images) * torch.nan


def save_tiny_lora(folder: Path, seed: int, guides: list[str] | None) -> Path:
    from peft import LoraConfig

    from acpo_utils.lora import save_lora
    from tests.tiny_models import tiny_unet

    folder.mkdir(parents=True)
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    torch.manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    save_lora(unet, folder)
    if guides is not None:
        (folder / "args.json").write_text(json.dumps({"evaluator": guides, "quality_weight": 0.1}))
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory, tiny_guide):
    folder = tmp_path_factory.mktemp("loras")
    first = save_tiny_lora(folder / "first", 1, [f"ipce:{tiny_guide}"])
    return first, save_tiny_lora(folder / "second", 2, None)


@pytest.fixture
def flags(tiny_pipeline, tiny_guide, loras, tmp_path):
    (tmp_path / "held-out.txt").write_text("\n".join(PROMPTS) + "\n")

    def build(**changes):
        options = {
            "pretrained_model_name_or_path": tiny_pipeline,
            "lora": loras[0],
            "prompts": tmp_path / "held-out.txt",
            "num_inference_steps": 2,
            "eval_batch_size": 2,
            "metrics": [f"ipce:{tiny_guide}", "python:tests.scripts.test_evaluate_acpo:redness"],
            "output_dir": tmp_path / "out",
        } | changes
        return command_line(**options)

    return build


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_two_loras_two_prompt_sets_and_every_output(
    flags, loras, tmp_path, tiny_pipeline, tiny_guide, captioned_images
):
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\na tower\tWorld\na bridge\tWorld\na boat\tWorld\n")
    out = run_script(
        SCRIPT,
        *flags(
            lora=loras,
            prompts=[tmp_path / "held-out.txt", f"partiprompts:{tmp_path / 'parti.tsv'}"],
            metrics=[f"ipce:{tiny_guide}", "python:tests.scripts.test_evaluate_acpo:redness", "mse", "pickscore"]
            + ["python:tests.scripts.test_evaluate_acpo:breaks"],
            real_data_dir=captioned_images,
            max_real_images=4,
            num_grid_pairs=2,
        ),
    )
    folder = tmp_path / "out"
    results = json.loads((folder / "results.json").read_text())
    assert list(results["images"]) == ["base", "first", "second"]
    assert [prompt["text"] for prompt in results["prompts"]] == [*PROMPTS, "a tower", "a bridge", "a boat"]
    ipce, red = "ipce-guide", "redness"
    assert list(results["scores"]) == [ipce, red]
    assert "unavailable" in out and set(results["unavailable"]) == {
        "pickscore",
        "breaks",
    }
    assert "not finite" in results["unavailable"]["breaks"]
    rows = {(row["model"], row["prompts"], row["metric"]): row for row in results["rows"]}
    assert len(rows) == 2 * 2 * 2 + 2, "models x sets x metrics, and mse of each model"

    # The numbers are those of the images, and the images those of a stock pipeline from the same noise.
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from acpo_utils.lora import LORA_NAME
    from acpo_utils.statistics import holm, paired_comparison

    for model, lora in zip(results["images"], (None, *loras)):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        if lora is not None:
            pipeline.load_lora_weights(lora, weight_name=LORA_NAME)
        noise = [step_generator(0, row) for row in (2, 3)]
        stock = pipeline(PROMPTS[2:4], num_inference_steps=2, generator=noise, output_type="np").images
        for image, name in zip(stock, results["images"][model][2:4]):
            assert np.abs(pixels(folder / name) - image * 255).max() <= 1
    first = [pixels(folder / results["images"][model][0]) for model in results["images"]]
    assert np.abs(first[0] - first[1]).max() > 3 and np.abs(first[1] - first[2]).max() > 3

    scores = {m: [pixels(folder / i)[..., 0].mean() / 255 for i in names] for m, names in results["images"].items()}
    for model in scores:
        assert results["scores"][red][model] == pytest.approx(scores[model], abs=1e-5)
    expected = paired_comparison(scores["base"][5:], scores["second"][5:])
    row = rows["second", "PartiPrompts", red]
    assert row["n"] == 3 and row["mean_difference"] == pytest.approx(expected["mean_difference"], abs=1e-6)
    assert row["p"] == pytest.approx(expected["p"], rel=1e-2) and row["win_rate_low"] <= row["win_rate"]
    tested = [r for r in results["rows"] if r["p"] is not None]
    assert [r["p_holm"] for r in tested] == pytest.approx(holm([r["p"] for r in tested]))

    # The guide is marked for the model that it guided, and for no other.
    assert rows["first", "held-out", ipce]["guide"] and not rows["second", "held-out", ipce]["guide"]
    assert not rows["first", "held-out", red]["guide"]
    mse = rows["first", Path(captioned_images).name, "mse"]
    assert (
        mse["lower_is_better"] and mse["n"] == 4 and 0 < mse["base_mean"] < 10 and len(results["errors"]["base"]) == 4
    )
    table = (folder / "table.md").read_text()
    assert f"{ipce} (guide)" in table and "mse ↓" in table and table.split("\n")[0] in out
    for line in table.split("\n"):
        assert line.count("(guide)") <= ("first" in line)

    with open(folder / "scores.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 24 and lines[2]["text"] == "a green | wall"
    assert float(lines[9][red]) == pytest.approx(results["scores"][red]["first"][1])
    with open(folder / "table.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    # Ranked by the first metric that is no guide: redness for "first", the evaluator for "second".
    assert {f"grids/{m}-random.png" for m in ("first", "second")} <= set(results["grids"])
    assert all((folder / name).stat().st_size > 5000 for name in results["grids"])

    from tests.evaluation.test_html_report import Page

    page = Page((folder / "report.html").read_text())
    figures = [attributes for tag, attributes in page.tags if tag == "figure" and "data-index" in attributes]
    assert len(figures) == 8 and len(page.references) == 24 + len(results["grids"])
    assert all((folder / reference).is_file() for reference in page.references)


def test_the_panel_beside_real_images_of_the_same_captions(flags, loras, tmp_path, captioned_images):
    captions = read_real_images(captioned_images, caption_column="text").captions
    (tmp_path / "held-out.txt").write_text("\n".join([*captions[2:6], "a wall"]) + "\n")
    (tmp_path / "unseen.txt").write_text("a tower\na bridge\na boat\n")
    sets = [tmp_path / "held-out.txt", tmp_path / "unseen.txt"]
    metrics = ["kid:alex", "swd", "st-lpips:alex", "ssim", "edge-energy", "python:tests.guides:brightness"]
    out = run_script(SCRIPT, *flags(prompts=sets, metrics=metrics, real_data_dir=captioned_images))
    folder = tmp_path / "out"
    results = json.loads((folder / "results.json").read_text())
    assert "4 of 8 prompts have a real image" in out
    rows = {(row["prompts"], row["metric"]): row for row in results["rows"]}
    beside = ["kid:alex", "swd-32", "swd-16", "edge-energy"]
    assert {label for prompts, label in rows if prompts == "unseen"} == {*beside, "brightness"}
    assert {label for prompts, label in rows if prompts == "held-out"} == {
        *beside,
        "st-lpips:alex",
        "ssim",
        "brightness",
    }
    reason = "it needs prompts that are captions of real images"
    assert results["unavailable"] == {"st-lpips:alex, unseen": reason, "ssim, unseen": reason}

    # Row by row the distance is that of the prompt's own real image.
    def image(name):
        return torch.from_numpy(pixels(folder / name)).permute(2, 0, 1)[None] / 255

    for model, mean in {"base": "base_mean", "first": "finetuned_mean"}.items():
        found = [
            ssim(image(name), image(f"real_images/{row + 2:06d}.png")).item()
            for row, name in enumerate(results["images"][model][:4])
        ]
        assert rows["held-out", "ssim"][mean] == pytest.approx(np.mean(found), abs=1e-5)
    assert rows["held-out", "ssim"]["n"] == 4 and rows["held-out", "kid:alex"]["n"] == 5
    assert rows["held-out", "edge-energy"]["real_mean"] > 0
    assert results["real_images"] == [*(f"real_images/{row:06d}.png" for row in range(2, 6)), None, None, None, None]
    assert 'alt="real"' in (folder / "report.html").read_text()
    assert "edge-energy → real" in out and "swd-32 ↓" in out and "change [95 %]" in out


def test_latents_are_not_clipped_whatever_scheduler_the_model_was_saved_with(flags, tiny_pipeline, tmp_path):
    """A PNDM scheduler's configuration says nothing of clip_sample, which DDIM by itself switches on."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    folder = tmp_path / "pndm"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipeline.scheduler = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    pipeline.save_pretrained(folder)
    for scheduler in models.SCHEDULERS:
        args = script.parse_args(flags(pretrained_model_name_or_path=folder, scheduler=scheduler))
        script.check_models(args)
        config = script.load_model(str(folder), args, torch.float32, "cpu").scheduler.config
        assert config.beta_schedule == "scaled_linear" and config.thresholding is False
        assert scheduler != "ddim" or config.clip_sample is False


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = folder.glob("images/*/*.png")
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_second_run_keeps_what_is_finished_and_makes_the_rest_again(flags, tmp_path):
    folder = tmp_path / "out"
    run_script(SCRIPT, *flags())
    before = state(folder)
    assert len(before) == 10
    run_script(SCRIPT, *flags())
    assert state(folder) == before, "nothing is drawn again"

    damaged = {"images/base/held-out-000001.png", "images/first/held-out-000004.png"}
    (folder / "images/base/held-out-000001.png").unlink()
    whole = (folder / "images/first/held-out-000004.png").read_bytes()
    (folder / "images/first/held-out-000004.png").write_bytes(whole[: len(whole) // 2])
    manifest = folder / "images" / "first" / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(lines[1:]) + "\n")  # as if image 0 had never been finished
    run_script(SCRIPT, *flags())
    after = state(folder)
    assert {name: content for name, (content, _) in after.items()} == {
        n: content for n, (content, _) in before.items()
    }
    changed = {name for name in after if after[name] != before[name]}
    assert changed == damaged | {"images/first/held-out-000000.png"}

    # Another seed is other images; so are other weights under the same name, and the base stays.
    run_script(SCRIPT, *flags(seed=1))
    assert all(state(folder)[name][0] != content for name, (content, _) in after.items())
    seeded = state(folder)
    other = save_tiny_lora(tmp_path / "first", 3, None)
    run_script(SCRIPT, *flags(seed=1, lora=other))
    again = state(folder)
    assert all((again[name] == seeded[name]) == ("base" in name) for name in seeded)


def test_two_processes_draw_what_one_draws(flags, tmp_path):
    run_script(SCRIPT, *flags())
    out = launch(SCRIPT, *flags(output_dir=tmp_path / "two"), num_processes=2)
    one, two = state(tmp_path / "out"), state(tmp_path / "two")
    assert len(one) == 10 and {n: content for n, (content, _) in one.items()} == {n: c for n, (c, _) in two.items()}
    rows = [json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("out", "two")]
    assert rows[0] == rows[1] and "The report is" in out
    assert [path.name for path in (tmp_path / "two" / "images" / "base").glob("*.jsonl")] == ["manifest.jsonl"]


def save_tiny_ddpm(folder: Path, seed: int) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


def test_unconditional_models_without_prompts(flags, tmp_path, captioned_images):
    base, tuned = save_tiny_ddpm(tmp_path / "ddpm", 0), save_tiny_ddpm(tmp_path / "ddpm-acpo", 1)
    options = flags(
        pretrained_model_name_or_path=base,
        lora=None,
        finetuned=tuned,
        prompts=None,
        num_images=4,
        real_data_dir=captioned_images,
        metrics=["python:tests.scripts.test_evaluate_acpo:redness", "mse", "fid"],
    )
    run_script(SCRIPT, *options)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [prompt["text"] for prompt in results["prompts"]] == [None] * 4
    assert {row["metric"] for row in results["rows"]} >= {"mse", "redness"}

    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    pipeline = DDIMPipeline(UNet2DModel.from_pretrained(tuned, subfolder="unet"), DDIMScheduler())
    noise = [step_generator(0, row) for row in (0, 1)]
    stock = pipeline(batch_size=2, num_inference_steps=2, generator=noise, output_type="np").images
    for image, name in zip(stock, results["images"]["ddpm-acpo"]):
        assert np.abs(pixels(tmp_path / "out" / name) - image * 255).max() <= 1
    assert "unconditional 0" in (tmp_path / "out" / "report.html").read_text()


def test_the_demo_is_compared_by_its_guide_and_its_judge(loras):
    args = script.parse_args(["--lora", str(loras[0])])
    settings = json.loads((EXAMPLES / "demo" / "evaluation.json").read_text())
    assert args.demo and args.pretrained_model_name_or_path == str(EXAMPLES / "demo" / "pipeline")
    assert {name: getattr(args, name) for name in settings if name != "pretrained_model_name_or_path"} == {
        name: value for name, value in settings.items() if name != "pretrained_model_name_or_path"
    }
    compared = script.check_models(args)
    assert compared == {"base": args.pretrained_model_name_or_path, "first": str(loras[0])}
    prompts = script.read_all_prompts(args)
    assert len(prompts) == 300 and all(prompt.set == "new_combinations" for prompt in prompts)
    metrics = script.choose_metrics(args, {"first": ["ipce:guide"]})
    judge = EXAMPLES / "demo" / "judge"
    assert metrics == ["ipce:guide", f"judge:{judge}", *PANEL, "mse"]
    real = read_real_images(args.real_data_dir, max_real_images=args.max_real_images)
    assert len(real.dataset) == 594 and real.image_column == "image" and real.captions is None
    # What is given takes the place of the demo's.
    args = script.parse_args(["--lora", str(loras[0]), "--prompts", "demo-unseen", "--max_prompts", "7"])
    assert args.demo and args.prompts == ["demo-unseen"] and args.max_prompts == 7
    assert args.real_data_dir.endswith("unseen_concepts.parquet")


BAD_INPUT = {
    "nothing to compare": ({"lora": None}, "give --lora or --finetuned"),
    "missing lora": ({"lora": "no/such/lora"}, "LoRA file not found: no/such/lora"),
    "model": ({"pretrained_model_name_or_path": "no/such/model"}, "'no/such/model' could not be read"),
    "prompts": ({"prompts": "no/prompts.txt"}, "no/prompts.txt"),
    "no prompts": ({"prompts": None}, "--prompts: expected drawbench"),
    "metric": ({"metrics": "clipscores"}, "--metrics clipscores: expected one of"),
    "real images": ({"metrics": "fid"}, "--metrics fid compares with real images: give --real_data_dir"),
    "real folder": ({"metrics": "fid", "real_data_dir": "no/images"}, "--real_data_dir no/images"),
    "rank by": ({"rank_by": "judge"}, "--rank_by: expected one of ipce-guide"),
    "one prompt": ({"max_prompts": 1}, "--max_prompts: expected at least 2, found 1"),
    "no steps": ({"num_inference_steps": 0}, "--num_inference_steps: expected at least 1, found 0"),
    "output folder": ({"output_dir": "/proc/acpo"}, "/proc/acpo cannot be written to"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_that_names_it(flags, case):
    changes, expected = BAD_INPUT[case]
    message = refused(SCRIPT, *flags(**changes))
    assert expected in message and "\n" not in message


def test_models_that_do_not_fit_are_refused(flags, tmp_path, loras, tiny_pipeline):
    ddpm = save_tiny_ddpm(tmp_path / "ddpm", 0)
    message = refused(SCRIPT, *flags(finetuned=ddpm))
    assert "expected a pipeline like the base model's, found DDPMPipeline" in message
    message = refused(SCRIPT, *flags(pretrained_model_name_or_path=ddpm))
    assert "takes no --lora" in message
    shutil.copytree(loras[0], tmp_path / "damaged")
    file = tmp_path / "damaged" / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    message = refused(SCRIPT, *flags(lora=tmp_path / "damaged"))
    assert "is damaged" in message and not (tmp_path / "out").exists()
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "held-out.txt").write_text("one\ntwo\n")
    twice = [tmp_path / "held-out.txt", tmp_path / "same" / "held-out.txt"]
    assert "rename one of the two files" in refused(SCRIPT, *flags(prompts=twice))
