"""Evaluators by name, several of them as one guide, and the contract that a guide has to keep.

What an evaluator has is in `acpo_utils.evaluators.protocol`. `acpo_utils.evaluators.IPCE` and `TwoStreamIQA` are imported
when they are used.
"""

import importlib
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from acpo_utils.evaluators.protocol import Evaluator
from acpo_utils.files import one_line


# kind in a spec: (class in a saved evaluator's config.json, module that holds it)
SAVED = {
    "ipce": ("IPCE", "acpo_utils.evaluators.ipce"),
    "two-stream": ("TwoStreamIQA", "acpo_utils.evaluators.two_stream"),
}
CLIP_METRIC_NAMES = ("pickscore", "clipscore")
SPECS = (
    '"ipce:PATH", "two-stream:PATH", PATH of a saved evaluator, "pickscore", "clipscore", "pyiqa:NAME" or '
    '"python:MODULE:NAME"'
)


class PythonEvaluator:
    """A callable of the user's own, (images, prompts) -> (batch,) in (0, 1), with the face of an evaluator."""

    def __init__(self, function: Callable[[torch.Tensor, list[str] | None], torch.Tensor]):
        self.function = function
        low, high = getattr(function, "score_range", (0.0, 1.0))
        self.score_range = (low, high)

    def score(self, images: torch.Tensor, prompts: list[str] | None = None) -> torch.Tensor:
        return self.function(images, prompts)


class WeightedEvaluators:
    """Several evaluators as one guide: `score` is the weighted mean of their scores, so it is in (0, 1) as they are.

    Args:
        evaluators: by the name under which each is logged and reported. weights: one for each, summing to 1.
    """

    score_range = (0.0, 1.0)  # the parts keep their own

    def __init__(self, evaluators: dict[str, Evaluator], weights: Sequence[float]):
        self.evaluators, self.weights = dict(evaluators), list(weights)
        self.last_scores: dict[str, torch.Tensor] = {}  # of the last call: each part's mean, detached

    def score(self, images: torch.Tensor, prompts: list[str] | None = None) -> torch.Tensor:
        scores = {name: evaluator.score(images, prompts) for name, evaluator in self.evaluators.items()}  # (B,) each
        self.last_scores = {name: part.detach().float().mean() for name, part in scores.items()}
        return _weighted_sum(self.weights, [part.float() for part in scores.values()])


def _weighted_sum(weights: Sequence[float], scores: Sequence[torch.Tensor]) -> torch.Tensor:
    first, *others = (weight * part for weight, part in zip(weights, scores))
    return sum(others, start=first)


def guide_weights(specs: Sequence[str], weights: Sequence[float] | None = None) -> list[float]:
    """One weight for each of `specs`, summing to 1; equal ones if none are given.

    Raises ValueError, in one line, for another number of weights than of evaluators, or one that is not positive.
    """
    weights = weights or [1.0 for _ in specs]
    if len(weights) != len(specs):
        raise ValueError(f"expected no weight or one for each evaluator, found {len(weights)} for {len(specs)}")
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"expected weights above 0, found {', '.join(f'{weight:g}' for weight in weights)}")
    return [weight / sum(weights) for weight in weights]


def load_guide(
    specs: Sequence[str], weights: Sequence[float] | None = None, device: str | torch.device | None = None
) -> Evaluator:
    """What `specs` name: the one evaluator itself, or several as `WeightedEvaluators`.

    Raises ValueError as `guide_weights` and `load_evaluator` do.
    """
    weights = guide_weights(specs, weights)
    if len(specs) == 1:
        return load_evaluator(specs[0], device)
    evaluators = {name: load_evaluator(spec, device) for name, spec in named_specs(specs).items()}
    return WeightedEvaluators(evaluators, weights)


def named_specs(specs: Sequence[str]) -> dict[str, str]:
    """`specs` by short names that differ, fit for the tags of trackers."""
    named: dict[str, str] = {}
    for spec in specs:
        kind, _, rest = spec.partition(":")
        name = re.sub(r"[^-\w.]+", "-", f"{kind}-{Path(rest).name}" if rest else Path(spec).name)
        numbered = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
        named[next(name for name in numbered if name not in named)] = spec
    return named


def guide_parts(guide: Evaluator) -> dict[str, Evaluator]:
    """The rows of a report: `guide` itself and, if it is several evaluators, each of them, named by weight and name."""
    if not isinstance(guide, WeightedEvaluators):
        return {"guide": guide}
    parts = zip(guide.weights, guide.evaluators.items())
    return {"guide": guide} | {f"guide {weight:.2g} {name}": evaluator for weight, (name, evaluator) in parts}


def part_scores(guide: Evaluator) -> dict[str, torch.Tensor]:
    """Of several evaluators, each one's own mean score of the last call, by the name under which it is logged; else {}."""
    return {f"score_{name}": score for name, score in getattr(guide, "last_scores", {}).items()}


def load_evaluator(spec: str, device: str | torch.device | None = None) -> Evaluator:
    """The frozen evaluator that `spec` names, in eval mode, on `device`.

    - `ipce:PATH`, `two-stream:PATH`: a folder (or hub repository) written by `save_pretrained` of `IPCE` or
      `TwoStreamIQA`, in safetensors;
    - `PATH`: such a folder, of the class that its config.json names;
    - `pickscore`, `clipscore`: their CLIPs from the hub; `pickscore:PATH`, `clipscore:PATH`: from a local folder
      (`acpo_utils.evaluators.clip_metrics.load_clip_metric`, which also says how they are mapped to (0, 1));
    - `pyiqa:NAME`: a no-reference metric of the package pyiqa, noncommercial (`acpo_utils.evaluators.pyiqa_metric.load_pyiqa_metric`);
    - `python:MODULE:NAME`: a callable that can be imported here; nothing is downloaded for it. A `torch.nn.Module` is
      frozen and moved to `device`; its `score_range`, if it has one, is used in reports.

    No code of a hub repository is executed. Raises ValueError, in one line, if the spec is unknown or what it
    names cannot be used, and ImportError for a package that is not installed.
    """
    spec = str(spec)
    kind, _, rest = spec.partition(":")
    if kind == "python":
        return _load_callable(spec, rest, device)
    if spec in CLIP_METRIC_NAMES:
        from acpo_utils.evaluators.clip_metrics import load_clip_metric

        return load_clip_metric(spec, None, device)
    if ":" in spec and kind not in (*SAVED, *CLIP_METRIC_NAMES, "pyiqa") and not Path(spec).exists():
        raise ValueError(f"Evaluator {spec!r}: expected {SPECS}, found the unknown kind {kind!r}.")
    if not spec or spec.endswith(":"):
        raise ValueError(f"Evaluator {spec!r}: expected {SPECS}, found no {'name' if kind == 'pyiqa' else 'path'}.")
    if kind == "pyiqa":
        from acpo_utils.evaluators.pyiqa_metric import load_pyiqa_metric

        return load_pyiqa_metric(rest, device)
    if kind in CLIP_METRIC_NAMES:
        from acpo_utils.evaluators.clip_metrics import load_clip_metric

        return load_clip_metric(kind, rest, device)
    return _load_saved(spec, kind, rest, device)


def _load_saved(spec: str, kind: str, rest: str, device: str | torch.device | None) -> Evaluator:
    path = rest if kind in SAVED else spec
    on_hub = kind in SAVED and path.count("/") == 1 and path[0] not in "./~" and not Path(path).exists()
    if on_hub:
        class_name, module = SAVED[kind]
    else:
        expected = [SAVED[kind]] if kind in SAVED else list(SAVED.values())
        found = _saved_class(spec, Path(path), [class_name for class_name, _ in expected])
        class_name, module = next(pair for pair in expected if pair[0] == found)
    try:
        evaluator = getattr(importlib.import_module(module), class_name).from_pretrained(path, use_safetensors=True)
    except Exception as error:  # of many kinds: file system, safetensors, shapes, tokenizer, network
        where = "a local folder or a repository on the hub" if on_hub else f"a complete {class_name} folder"
        reason = one_line(error)
        raise ValueError(f"Evaluator {spec!r}: expected {where}, but it cannot be loaded: {reason}") from error
    return evaluator.requires_grad_(False).eval().to(device)


def _saved_class(spec: str, folder: Path, expected: list[str]) -> str:
    """The class, one of `expected`, that the config.json in `folder` names. Raises ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"Evaluator {spec!r}: expected {SPECS}, found no folder {folder}.")
    if (folder / "model_index.json").is_file():
        raise ValueError(f"Evaluator {spec!r}: expected an evaluator, found a diffusers pipeline in {folder}.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"Evaluator {spec!r}: expected a saved evaluator, found no config.json in {folder}.")
    try:
        found = json.loads((folder / "config.json").read_text()).get("_class_name")
    except ValueError as error:
        raise ValueError(f"Evaluator {spec!r}: {folder / 'config.json'} is not valid JSON ({error}).") from error
    if found not in expected:
        names = " or ".join(expected)
        raise ValueError(f"Evaluator {spec!r}: expected class {names} in config.json of {folder}, found {found!r}.")
    return found


def _load_callable(spec: str, rest: str, device: str | torch.device | None) -> PythonEvaluator:
    module_name, _, name = rest.partition(":")
    if not module_name or not name:
        raise ValueError(f'Evaluator {spec!r}: expected "python:MODULE:NAME", found no module and name.')
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Evaluator {spec!r}: cannot import it ({error}). Is its folder on PYTHONPATH?") from error
    if isinstance(function, type) or not callable(function):
        raise ValueError(f"Evaluator {spec!r}: expected a callable (images, prompts), found {function!r}.")
    if isinstance(function, torch.nn.Module):
        function.requires_grad_(False).eval().to(device)
    return PythonEvaluator(function)


def check_evaluator(
    evaluator: Evaluator, images: torch.Tensor, prompts: list[str] | None = None, name: str | None = None
) -> torch.Tensor:
    """Raises ValueError unless `evaluator` can guide training; returns its scores (B,) of `images`, detached.

    `images` (B, 3, H, W) are what training will hand over, in [0, 1]. Checked: one score for each image, all in
    (0, 1); a finite, non-zero gradient to the images; the same scores again on a second call. Of several evaluators
    each is checked, since a mean would hide one without gradient. `name` is what an error calls it.
    """
    if isinstance(evaluator, WeightedEvaluators):
        parts = evaluator.evaluators.items()
        scores_of_parts = [check_evaluator(part, images, prompts, part_name) for part_name, part in parts]
        return _weighted_sum(evaluator.weights, scores_of_parts)
    name = name or type(getattr(evaluator, "function", evaluator)).__name__
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Images for the evaluator: expected (batch, 3, height, width), found {tuple(images.shape)}.")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"Images for the evaluator: expected values in [0, 1], found {low:.4g} to {high:.4g}.")
    images = images.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        scores = evaluator.score(images, prompts)
    if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != (len(images),):
        found = str(tuple(scores.shape)) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"Evaluator {name}: expected one score for each image, ({len(images)},), found {found}.")
    if not bool(((scores > 0) & (scores < 1)).all()):
        found = ", ".join(f"{score:.4g}" for score in scores.tolist()[:4])
        raise ValueError(f"Evaluator {name}: expected scores in (0, 1), found {found}.")
    gradient = None
    if scores.requires_grad:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(scores.float().sum(), images, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"Evaluator {name}: expected scores that are differentiable in the images, found no gradient."
        )
    if not bool(gradient.isfinite().all()):
        raise ValueError(f"Evaluator {name}: expected a finite gradient to the images, found nan or inf.")
    if not bool(gradient.any()):
        raise ValueError(f"Evaluator {name}: expected a non-zero gradient to the images, found zero everywhere.")
    with torch.no_grad():
        difference = (evaluator.score(images.detach(), prompts) - scores.detach()).abs().max().item()
    if difference > 1e-4:
        raise ValueError(
            f"Evaluator {name}: expected the same scores for the same images, found a difference of {difference:.2g} "
            "on a second call. Is dropout or random cropping on?"
        )
    return scores.detach()
