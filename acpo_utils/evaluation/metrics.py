"""The metrics of an evaluation by name: which there are, which of them guided a model's training, and their values."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from acpo_utils.evaluation.diversity import DIVERSITY, lpips_diversity
from acpo_utils.evaluation.panel import BESIDE_REAL, MEMBERS, PANEL
from acpo_utils.evaluation.set_metrics import fid, image_features, inception, inception_score, read_images
from acpo_utils.evaluators.loading import CLIP_METRIC_NAMES, SAVED, load_evaluator


PYIQA = ("hyperiqa", "maniqa")  # named alone; others as pyiqa:NAME
NEED_PROMPTS = ("ipce", "clipscore", "pickscore", "judge")
NEED_REAL_IMAGES = ("fid", "mse", *BESIDE_REAL)
ALONE = ("fid", "is", "lpips-diversity", "mse", *PYIQA)  # names without a path
SET_METRICS = ("fid", "is", "lpips-diversity")  # one value for a set of images; the panel's are in `MEMBERS`
LOWER_IS_BETTER = ("fid", "mse")
# A row that says what the metric is made of, since it does not compare with the numbers of publications.
ROWS = {"lpips-diversity": DIVERSITY}
NAMES = (
    "ipce:PATH, two-stream:PATH, clipscore, pickscore, hyperiqa, maniqa, pyiqa:NAME, python:MODULE:NAME, judge, "
    f"fid, is, lpips-diversity, mse, panel, or of the panel {', '.join(MEMBERS)}"
)


def expand_panel(specs: Sequence[str]) -> list[str]:
    """`specs` with "panel" replaced by its members, each once."""
    return list(dict.fromkeys(name for spec in specs for name in (PANEL if spec == "panel" else (spec,))))


def check_metric(spec: str) -> None:
    """Raises ValueError, in one line, unless `spec` names a metric (`NAMES`), and its folder, if it has one, exists."""
    kind, _, rest = spec.partition(":")
    if spec in ("panel", *MEMBERS):
        return
    if kind in ALONE:
        if spec != kind:
            raise ValueError(f"--metrics {spec}: expected {kind} alone.")
    elif kind == "judge" or (kind in CLIP_METRIC_NAMES and rest):
        if not Path(rest).is_dir():
            raise ValueError(f"--metrics {spec}: expected {kind}:PATH with its folder, found no folder {rest!r}.")
    elif kind in ("pyiqa", "python", *SAVED):
        if not rest or (kind in SAVED and not Path(rest).is_dir() and rest.count("/") != 1):
            raise ValueError(f"--metrics {spec}: expected one of {NAMES}, found no {rest or 'name or path'}.")
    elif not spec or (spec not in CLIP_METRIC_NAMES and not Path(spec).is_dir()):
        raise ValueError(f"--metrics {spec}: expected one of {NAMES}, or a saved evaluator's folder.")


def metric_labels(specs: Sequence[str]) -> dict[str, str]:
    """The name of its row for each of `specs`, each different: "ipce:iqa/agiqa-3k" is "ipce-agiqa-3k"."""
    labels = {}
    for spec in specs:
        kind, _, rest = spec.partition(":")
        if kind in ROWS:
            name = ROWS[kind]
        elif spec in MEMBERS:
            name = spec
        elif kind == "judge":
            name = kind
        elif kind in ("pyiqa", "python"):
            name = rest.rpartition(":")[2]
        else:
            name = re.sub(r"[^-\w.]+", "-", f"{kind}-{Path(rest).name}" if rest else Path(spec).name)
        numbered = (name, *(f"{name}-{n}" for n in range(2, len(specs) + 2)))
        labels[spec] = next(name for name in numbered if name not in labels.values())
    return labels


def read_guides(folder: str | Path) -> list[str]:
    """The evaluators that guided the training of the model in `folder`, by its args.json or its model card.

    Empty if it was trained without quality loss, or if nothing says how it was trained.
    """
    folder = Path(folder)
    folder = folder.parent if folder.is_file() else folder
    settings = {}
    if (folder / "args.json").is_file():
        try:
            settings = json.loads((folder / "args.json").read_text())
        except ValueError:  # not ours, or torn: the card says it too
            settings = {}
    if not isinstance(settings, dict) or "evaluator" not in settings:
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        settings = dict(re.findall(r"^\| `(evaluator|quality_weight)` \| (.*) \|$", text, flags=re.MULTILINE))
    evaluators = settings.get("evaluator") or []
    try:
        weight = float(settings.get("quality_weight", 1))
    except (TypeError, ValueError):
        weight = 1.0
    evaluators = evaluators.split(", ") if isinstance(evaluators, str) else evaluators
    return [str(spec) for spec in evaluators] if weight else []


def is_guide(spec: str, guides: Sequence[str]) -> bool:
    """Whether the metric `spec` is one of `guides`: the same name, or the same folder.

    A guide whose folder is not here, because the model was trained elsewhere, is known by its kind and its folder's
    last name: rather one metric too many is marked than one too few.
    """

    def parts(spec: str) -> tuple[str, str]:
        spec = f"pyiqa:{spec}" if spec in PYIQA else spec
        kind, _, rest = spec.partition(":")
        return (kind, rest) if rest or kind in CLIP_METRIC_NAMES else ("", spec)

    kind, path = parts(spec)
    for guide in guides:
        guide_kind, guide_path = parts(guide)
        if (kind, path) == (guide_kind, guide_path) or (kind == guide_kind and kind in CLIP_METRIC_NAMES):
            return True
        if kind in ("pyiqa", "python") or not path or not guide_path:
            continue
        same_kind = "" in (kind, guide_kind) or kind == guide_kind
        here = Path(guide_path).exists()
        same = Path(path).resolve() == Path(guide_path).resolve() if here else Path(path).name == Path(guide_path).name
        if same_kind and same:
            return True
    return False


@torch.no_grad()
def score_files(spec: str, files: dict[str, list[Path]], prompts: list[str] | None, device) -> dict[str, list[float]]:
    """Scores of every model's images, in their reporting range: {model: N floats} of {model: N files}.

    Raises ValueError or ImportError, as the evaluators' loaders do, if `spec` cannot be had.
    """
    kind, _, rest = spec.partition(":")
    if kind == "judge":
        from acpo_utils.evaluators.judge import load_judge

        evaluator = load_judge(rest).to(device)
    else:
        evaluator = load_evaluator(f"pyiqa:{spec}" if spec in PYIQA else spec, device)
    low, high = getattr(evaluator, "score_range", (0.0, 1.0))
    result = {}
    for model, images in files.items():
        scores, start = [], 0
        for batch in read_images(images):
            texts = None if prompts is None else prompts[start : start + len(batch)]
            scores.append(evaluator.score(batch.to(device).float() / 255, texts).float().cpu())
            start += len(batch)
        result[model] = (low + (high - low) * torch.cat(scores)).tolist()
    return result


def set_values(spec: str, files: dict[str, list[Path]], real: list[Path] | None, device) -> dict[str, float]:
    """One number for each model's set of images, {model: value}; `spec` is of `SET_METRICS`.

    `real`: images to measure the distance from, where the metric is one. Raises ValueError or ImportError if the
    metric cannot be had, or for too few images.
    """
    if spec == "lpips-diversity":

        def diversity(images: list[Path]) -> float:
            return lpips_diversity(torch.cat(list(read_images(images))).float() / 255, device=device)[0]

        return {model: diversity(images) for model, images in files.items()}
    network = inception("logits_unbiased" if spec == "is" else "2048", device)
    features = {model: image_features(network, images, device) for model, images in files.items()}
    if spec == "is":
        return {model: inception_score(logits) for model, logits in features.items()}
    real_features = image_features(network, real, device)
    return {model: fid(real_features, generated) for model, generated in features.items()}
