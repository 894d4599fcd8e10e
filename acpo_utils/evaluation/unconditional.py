"""What an unconditional model is judged by: scores of the images it draws, and its error on images held out."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torchvision.utils import save_image

from acpo_utils.anchor import without_adapter
from acpo_utils.evaluation.denoising_error import unet_denoising_error
from acpo_utils.evaluation.diversity import DIVERSITY, lpips_diversity
from acpo_utils.evaluation.grids import comparison_picture
from acpo_utils.evaluation.guide_family import family_note
from acpo_utils.evaluation.panel import WITHOUT_PAIRS, measure_panel, panel_report
from acpo_utils.evaluation.sampling import sample_unconditional, score_images
from acpo_utils.evaluation.set_metrics import EFFICIENTNET_KID, efficientnet_kid
from acpo_utils.evaluation.table import comparison_table, finite_numbers
from acpo_utils.evaluators.efficientnet import check_batch
from acpo_utils.evaluators.loading import load_evaluator
from acpo_utils.files import atomic_write
from acpo_utils.statistics import paired_comparison


MSE = "MSE (lower is better)"
# The judges of a whole set of images, by name, and their rows in the table; every other judge scores single images.
SET_JUDGES = {"kid": EFFICIENTNET_KID, "diversity": DIVERSITY}
Values, Sets = dict[str, torch.Tensor], dict[str, tuple[float, float]]
BATCH_SIZE = 32
Score = Callable[[torch.Tensor], torch.Tensor]  # images (N, 3, H, W) in [0, 1] -> (N,), higher is better


def image_scorers(names: Sequence[str], device: str | torch.device | None = None) -> dict[str, Score]:
    """Scores of single images by name: functions from (N, 3, H, W) in [0, 1] to (N,) on the CPU, higher is better.

    A name is that of any evaluator that needs no prompts, as `acpo_utils.evaluators.load_evaluator` has it
    ("pyiqa:maniqa", "pyiqa:brisque", "two-stream:PATH"); its scores are in its reporting range.

    The functions raise ValueError if the images are not (N, 3, H, W) or leave [0, 1].

    Raises:
        ValueError: in one line, for an unknown name. ImportError: for a package that is not installed; the message
            has the pip command.
    """
    return {name: _scorer(name, device) for name in names}


def _scorer(name: str, device: str | torch.device | None) -> Score:
    evaluator = load_evaluator(name, device)
    low, high = getattr(evaluator, "score_range", (0.0, 1.0))

    def score(batch: torch.Tensor) -> torch.Tensor:
        scores = evaluator.score(batch.to(device, torch.float32).clamp(0, 1))  # (B,) in (0, 1)
        return (low + (high - low) * scores.float()).cpu()

    return _in_batches(score)


def _in_batches(score: Score) -> Score:
    @torch.no_grad()
    def score_all(images: torch.Tensor) -> torch.Tensor:
        check_batch(images)
        return torch.cat([score(batch) for batch in images.split(BATCH_SIZE)])

    return score_all


def split_judges(names: Sequence[str], device: str | torch.device) -> tuple[dict[str, Score], list[str]]:
    """Of `--judge`: the scores of single images, loaded, and the names of those that judge a set.

    All of them have run on return, so that a package that is missing is known before training.

    Raises ValueError and ImportError as `image_scorers` does.
    """
    scores = image_scorers([name for name in names if name not in SET_JUDGES], device)
    sets = [name for name in SET_JUDGES if name in names]
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for score in scores.values():
        score(images)
    judge_sets(sets, images, images, 0, device)
    return scores, sets


def judge_sets(names: Sequence[str], images: torch.Tensor, held_out: torch.Tensor, seed: int, device) -> Sets:
    """Those of `SET_JUDGES` that are named, {row: (mean, spread)}. `images`, `held_out`: (N, 3, H, W) in [0, 1]."""
    found = {}
    if "kid" in names:
        found[EFFICIENTNET_KID] = efficientnet_kid(held_out, images, seed, device)
    if "diversity" in names:
        found[DIVERSITY] = lpips_diversity(images, seed, device=device)
    return found


def sample_and_measure(
    pipeline,
    noise_scheduler,
    evaluators: dict,
    judges: tuple[dict[str, Score], list[str]],
    held_out: torch.Tensor | None,
    *,
    num_images: int,
    seed: int,
    batch_size: int,
    num_inference_steps: int,
    description: str,
) -> tuple[torch.Tensor, Values, Sets]:
    """Draws images and measures. Two models measured with the same settings have met the same noise throughout.

    Args:
        pipeline: DDPMPipeline or DDIMPipeline, on its device. noise_scheduler: of its training.
        evaluators: by name, with `score(images, None)`; None is left out. judges: of `split_judges`.
        held_out: (M, 3, H, W) in [0, 1], for KID and for the MSE of the paper's table 1, or None.
    Returns:
        Images (num_images, 3, H, W) in [0, 1]; one value for each image by metric, (num_images,), of the MSE (M,);
        mean and spread by metric of the whole set.
    """
    device = pipeline.device
    images = sample_unconditional(pipeline, num_images, seed, batch_size, num_inference_steps, description)
    values = {name: score_images(part, images, None, device) for name, part in evaluators.items() if part is not None}
    values |= {name: score(images) for name, score in judges[0].items()}
    if held_out is not None:
        values[MSE] = unet_denoising_error(pipeline.unet, noise_scheduler, held_out, seed, batch_size)
    return images, values, judge_sets(judges[1], images, held_out, seed, device)


def compare_measures(base: tuple[Values, Sets], finetuned: tuple[Values, Sets]) -> tuple[dict, str]:
    """Numbers for metrics.json and the table as markdown, of two models that `sample_and_measure` measured.

    `paired_comparison` of each metric of single images; a win is a higher score, of the MSE a lower error.
    """
    comparisons = {
        name: paired_comparison(base[0][name], finetuned[0][name], lower_is_better=name == MSE)
        for name in finetuned[0]
    }
    tables, sets = [comparison_table(comparisons)] if comparisons else [], {}
    if finetuned[1]:
        lines = ["| of the whole set | base | fine-tuned |", "|---|---|---|"]
        for name, values in finetuned[1].items():
            sets[name] = {"base": base[1][name], "finetuned": values}
            lines.append(f"| {name} | {_spread(base[1][name])} | {_spread(values)} |")
        tables.append("\n".join(lines))
    return {"comparisons": comparisons, "sets": sets}, "\n\n".join(tables)


def summarise_measures(values: Values, sets: Sets) -> tuple[dict, str]:
    """The same for a model that has no base: mean, standard deviation and number of the values of each metric."""
    summary = {
        name: {"n": len(value), "mean": value.double().mean().item(), "std": value.double().std().item()}
        for name, value in values.items()
    }
    lines = ["| metric | mean | std | n |", "|---|---|---|---|"]
    lines += [f"| {name} | {row['mean']:.4f} | {row['std']:.4f} | {row['n']} |" for name, row in summary.items()]
    lines += [f"| {name} | {mean:.4f} | {spread:.4f} | |" for name, (mean, spread) in sets.items()]
    return {"summary": summary, "sets": sets}, "\n".join(lines)


def compare_unconditional_models(
    build_pipeline: Callable,
    unet: torch.nn.Module,
    base_unet: torch.nn.Module | None,
    noise_scheduler,
    scorers: dict[str, object],
    judges: tuple[dict[str, Score], list[str]],
    held_out: torch.Tensor | None,
    output_dir: str | Path,
    *,
    num_images: int,
    seed: int,
    batch_size: int,
    num_inference_steps: int,
    events: dict,
) -> tuple[str, list[str]]:
    """Samples both models from the same noise, and compares: comparison.png, metrics.json, a printed table.

    Of a model trained from scratch, which has no base, the means alone, and samples.png.

    Args:
        build_pipeline: U-Net -> the pipeline that samples it. unet: trained, in eval mode.
        base_unet: as `without_adapter` takes it: `unet` itself if it has a LoRA, or a frozen copy; None from scratch.
        noise_scheduler: of the training. scorers: evaluators by name, with `score(images, None)`; None is left out.
            The scores of "guide" stand under the pictures.
        judges: of `split_judges`. held_out: (M, 3, H, W) in [0, 1], for KID, the MSE and the panel (`measure_panel`), or None.
        num_images: at least 4; of 0 nothing is sampled and nothing is written.
        events: what else of the run belongs into metrics.json, by name.
    Returns:
        The table as markdown, and the names of the pictures in `output_dir`.
    Raises ValueError as `paired_comparison` does.
    """
    if not num_images:
        return "", []
    output_dir = Path(output_dir)
    measure_model = partial(
        sample_and_measure,
        noise_scheduler=noise_scheduler,
        evaluators=scorers,
        judges=judges,
        held_out=held_out,
        num_images=num_images,
        seed=seed,
        batch_size=batch_size,
        num_inference_steps=num_inference_steps,
    )
    pipeline = build_pipeline(unet)
    device = pipeline.device
    images, values, sets = measure_model(pipeline, description="sampling the trained model")
    if base_unet is None:
        picture = "samples.png"
        numbers, table = summarise_measures(values, sets)
        with atomic_write(output_dir / picture) as temporary:
            save_image(images[:64], temporary)
    else:
        picture = "comparison.png"
        with without_adapter(base_unet) as base:
            base_pipeline = build_pipeline(base)
            base_images, base_values, base_sets = measure_model(base_pipeline, description="sampling the base model")
        numbers, table = compare_measures((base_values, base_sets), (values, sets))
        if held_out is not None:
            guides = [scorer for scorer in scorers.values() if scorer is not None]
            both = {"base": base_images, "finetuned": images}
            panel, lines = panel_report(measure_panel(WITHOUT_PAIRS, both, held_out, [], device, seed), guides)
            lines += family_note(row["family"] for row in panel.values())
            numbers["panel"], table = panel, "\n\n".join([table, *lines])
        titles = [f"noise {i}" for i in range(num_images)]
        guide_scores = (base_values["guide"], values["guide"]) if "guide" in values else None
        comparison_picture(output_dir / picture, base_images, images, titles, guide_scores)
    metrics = {"num_images": num_images} | events | numbers
    with atomic_write(output_dir / "metrics.json") as temporary:
        temporary.write_text(json.dumps(finite_numbers(metrics), indent=2))
    print(f"\n{table}\n\nThe picture, the numbers and the pipeline are in {output_dir.resolve()}")
    return table, [picture]


def _spread(value: tuple[float, float]) -> str:
    return f"{value[0]:.4f} ± {value[1]:.4f}"
