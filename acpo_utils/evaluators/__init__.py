"""Evaluators: what scores an image, to guide a training or to judge it. `acpo_utils.evaluators.protocol` says what one has."""

import importlib
from typing import TYPE_CHECKING, Any

from acpo_utils.evaluators.loading import (
    PythonEvaluator,
    WeightedEvaluators,
    check_evaluator,
    guide_parts,
    guide_weights,
    load_evaluator,
    load_guide,
    named_specs,
)
from acpo_utils.evaluators.protocol import Evaluator


if TYPE_CHECKING:
    from acpo_utils.evaluators.ipce import IPCE
    from acpo_utils.evaluators.two_stream import TwoStreamIQA

from acpo_utils.evaluators.worst_point import guide_score


__all__ = [
    "IPCE",
    "Evaluator",
    "PythonEvaluator",
    "TwoStreamIQA",
    "WeightedEvaluators",
    "check_evaluator",
    "guide_parts",
    "guide_score",
    "guide_weights",
    "load_evaluator",
    "load_guide",
    "named_specs",
]
# Imported when they are asked for: open_clip and diffusers' models take seconds.
_LAZY = {"IPCE": "ipce", "TwoStreamIQA": "two_stream"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
