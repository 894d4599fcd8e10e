"""The end of a training: base against fine-tuned Stable Diffusion on held-out prompts, in a table and a picture."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from acpo_utils.anchor import without_adapter
from acpo_utils.evaluation.denoising_error import prediction_drift
from acpo_utils.evaluation.grids import comparison_picture
from acpo_utils.evaluation.guide_family import FAMILY_MARK, family_note, shared_family
from acpo_utils.evaluation.panel import NO_REAL, PANEL, measure_panel, panel_report
from acpo_utils.evaluation.real_images import read_prompt_images
from acpo_utils.evaluation.sampling import sample_images, score_images
from acpo_utils.evaluation.table import comparison_table, finite_numbers
from acpo_utils.families import stable_diffusion
from acpo_utils.families.loading import denoiser
from acpo_utils.files import atomic_write
from acpo_utils.statistics import paired_comparison


DRIFT_IMAGES = 64  # each at ten timesteps: more would take as long as drawing them


def compare_models(
    pipeline,
    prompts: list[str],
    scorers: dict[str, object],
    output_dir: str | Path,
    *,
    seed: int,
    batch_size: int,
    num_inference_steps: int,
    guidance_scale: float,
    device: str | torch.device,
    events: dict,
    prompt_file: str | Path | None = None,
    predictor: Callable[..., Callable] = stable_diffusion.predictor,
    resolution: int | None = None,
    **more,
) -> tuple[str, list[str]]:
    """Samples with the LoRA off and on from the same noise, and compares: comparison.png, metrics.json, a printed table.

    Args:
        pipeline: a text-to-image pipeline whose U-Net has a LoRA, which is switched on before and after.
        prompts: n strings; of an empty list nothing is sampled and nothing is written.
        scorers: evaluators by name, each a row of the table; None is left out. The first one's scores stand under the
            pictures, so it should be the guide.
        device: where the evaluators are. events: what else of the run belongs into metrics.json, by name.
        prompt_file: from which the prompts were read, row by row. If it has their real images too (`read_prompt_images`), the
            panel's rows follow (`measure_panel`), and the real image is the third one in the picture.
        predictor: the family's, as in `prediction_drift`. resolution, more: as in `sample_images`.
    Returns:
        The table as markdown, with the drift below it (`prediction_drift`), and the names of the pictures in `output_dir`.
    Raises ValueError as `paired_comparison` does.
    """
    if not prompts:
        return "", []
    sample = partial(
        sample_images,
        pipeline,
        prompts,
        seed=seed,
        batch_size=batch_size,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        resolution=resolution,
        **more,
    )
    with without_adapter(denoiser(pipeline)):
        base_images = sample(description="sampling the base model")  # (n, 3, H, W) in [0, 1]
    images = sample(description="sampling the fine-tuned model")  # (n, 3, H, W) in [0, 1]

    comparisons, guide_scores = {}, None
    for name, scorer in scorers.items():
        if scorer is None:
            continue
        base_scores = score_images(scorer, base_images, prompts, device)  # (n,)
        scores = score_images(scorer, images, prompts, device)  # (n,)
        comparisons[name] = paired_comparison(base_scores, scores)
        guide_scores = guide_scores or (base_scores, scores)
    few = slice(DRIFT_IMAGES)
    drift = prediction_drift(pipeline, base_images[few], prompts[few], seed, batch_size, predictor)  # (up to 64,)
    drift_std = drift.std().item() if len(drift) > 1 else 0.0

    guides = [scorer for name, scorer in scorers.items() if name.split()[0] == "guide" and scorer is not None]
    families = {name: shared_family(scorer, guides) for name, scorer in scorers.items() if scorer not in guides}
    real = read_prompt_images(prompt_file, len(prompts), size=(images.shape[-1], images.shape[-2]))
    panel, panel_lines = {}, []
    if real:
        pairs = [(row, number) for number, row in enumerate(real)]
        both, real_images = {"base": base_images, "finetuned": images}, torch.stack(list(real.values()))
        panel, panel_lines = panel_report(measure_panel(PANEL, both, real_images, pairs, device, seed), guides)

    output_dir = Path(output_dir)
    metrics = {"comparisons": comparisons, "num_prompts": len(prompts)} | events
    metrics["sets"] = {"drift": [drift.mean().item(), drift_std]}
    if panel:
        metrics["panel"] = panel
    with atomic_write(output_dir / "metrics.json") as temporary:
        temporary.write_text(json.dumps(finite_numbers(metrics), indent=2))
    comparison_picture(output_dir / "comparison.png", base_images, images, prompts, guide_scores, real=real)
    shown = {f"{name} {FAMILY_MARK}" if families.get(name) else name: row for name, row in comparisons.items()}
    lines = [comparison_table(shown), *panel_lines]
    lines += family_note([*families.values(), *(row["family"] for row in panel.values())])
    lines.append(f"Drift (eq. 7 on noised samples of the base model, all timesteps): {drift.mean():.3g}")
    table = "\n\n".join(lines)
    print(f"\n{table}\n\nThe picture, the numbers and the LoRA are in {output_dir.resolve()}")
    if not real:
        print(NO_REAL)
    return table, ["comparison.png"]
