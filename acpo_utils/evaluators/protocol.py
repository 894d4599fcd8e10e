"""What an evaluator is: `acpo_utils` asks for nothing else of what guides a training."""

from typing import Protocol

import torch


class Evaluator(Protocol):
    """Scores images. A class of one's own needs no base class: these two, and it may be given wherever an evaluator is.

    One that guides a training is frozen and in eval mode, and `acpo_utils.evaluators.check_evaluator` says whether its
    scores keep to what follows.
    """

    @property
    def score_range(self) -> tuple[float, float]:
        """What the scores 0 and 1 mean in a report: (0, 1), or the ends of the evaluator's own scale."""
        ...

    def score(self, images: torch.Tensor, prompts: list[str] | None = None) -> torch.Tensor:
        """Scores (B,) in (0, 1), higher is better, of `images` (B, 3, H, W) in [0, 1], differentiable in them.

        `prompts` are the B texts that the images were made for, where there are any; an evaluator may ignore them.
        """
        ...
