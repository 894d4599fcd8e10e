"""Evaluators by name, and the contract that a guide has to keep.

An evaluator has `score(images, prompts=None) -> (batch,)` in (0, 1) for `images` (batch, 3, height, width) in [0, 1],
differentiable in `images`, and `score_range` for reports. `acpo_utils.evaluators.IPCE` is imported when it is used.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import torch


SPECS = '"ipce:PATH", PATH of a saved evaluator, or "python:MODULE:NAME"'


def __getattr__(name: str):
    if name == "IPCE":
        from acpo_utils.ipce import IPCE

        return IPCE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class PythonEvaluator:
    """A callable of the user's own, (images, prompts) -> (batch,) in (0, 1), with the face of an evaluator."""

    def __init__(self, function: Callable[[torch.Tensor, list[str] | None], torch.Tensor]):
        self.function = function
        self.score_range = tuple(getattr(function, "score_range", (0.0, 1.0)))

    def score(self, images: torch.Tensor, prompts: list[str] | None = None) -> torch.Tensor:
        return self.function(images, prompts)


def load_evaluator(spec: str, device: str | torch.device | None = None):
    """The frozen evaluator that `spec` names, in eval mode, on `device`.

    - `ipce:PATH`: a folder (or hub repository) written by `IPCE.save_pretrained`;
    - `PATH`: such a folder, of the class that its config.json names;
    - `python:MODULE:NAME`: a callable that can be imported here; nothing is downloaded for it. A `torch.nn.Module` is
      frozen and moved to `device`; its `score_range`, if it has one, is used in reports.

    Raises ValueError, in one line, if the spec is unknown or what it names cannot be used.
    """
    kind, _, rest = str(spec).partition(":")
    if kind == "python":
        return _load_callable(spec, rest, device)
    if kind != "ipce" and ":" in str(spec) and not Path(spec).exists():
        raise ValueError(f"Evaluator {spec!r}: expected {SPECS}, found the unknown kind {kind!r}.")
    path = rest if kind == "ipce" else str(spec)
    if not path:
        raise ValueError(f"Evaluator {spec!r}: expected {SPECS}, found no path.")
    on_hub = kind == "ipce" and path.count("/") == 1 and path[0] not in "./~" and not Path(path).exists()
    if not on_hub:
        _require_class(spec, Path(path), "IPCE")
    from acpo_utils.ipce import IPCE

    try:
        evaluator = IPCE.from_pretrained(path)
    except Exception as error:  # of many kinds: file system, safetensors, shapes, tokenizer, network
        where = "a local folder or a repository on the hub" if on_hub else "a complete IPCE folder"
        reason = " ".join(str(error).split())
        raise ValueError(f"Evaluator {spec!r}: expected {where}, but it cannot be loaded: {reason}") from error
    return evaluator.requires_grad_(False).eval().to(device)


def _require_class(spec: str, folder: Path, class_name: str) -> None:
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
    if found != class_name:
        raise ValueError(
            f"Evaluator {spec!r}: expected class {class_name} in config.json of {folder}, found {found!r}."
        )


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


def check_evaluator(evaluator, images: torch.Tensor, prompts: list[str] | None = None) -> torch.Tensor:
    """Raises ValueError unless `evaluator` can guide training; returns its scores (B,) of `images`, detached.

    `images` (B, 3, H, W) are what training will hand over, in [0, 1]. Checked: one score for each image, all in
    (0, 1); a finite, non-zero gradient to the images; the same scores again on a second call.
    """
    name = type(getattr(evaluator, "function", evaluator)).__name__
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Images for the evaluator: expected (batch, 3, height, width), found {tuple(images.shape)}.")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"Images for the evaluator: expected values in [0, 1], found {low:.4g} to {high:.4g}.")
    images = images.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        scores = evaluator.score(images, prompts)
    if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != (len(images),):
        found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
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
