"""Evaluators: what scores an image, to guide a training or to judge it. `acpo_utils.evaluators.loading` says what one has."""

import importlib

from acpo_utils.evaluators.loading import (
    PythonEvaluator,
    WeightedEvaluators,
    check_evaluator,
    guide_parts,
    guide_weights,
    load_evaluator,
    load_guide,
    named_specs,
    part_scores,
)


__all__ = [
    "IPCE",
    "PythonEvaluator",
    "TwoStreamIQA",
    "WeightedEvaluators",
    "check_evaluator",
    "guide_parts",
    "guide_weights",
    "load_evaluator",
    "load_guide",
    "load_judges",
    "named_specs",
    "part_scores",
]
# Imported when they are asked for: open_clip, diffusers' models and the judge's network take seconds.
_LAZY = {"IPCE": "ipce", "TwoStreamIQA": "two_stream", "load_judges": "judge"}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
