"""A guide scored at the worst point near an image too, so that its gradient says more of the image than of its own blind spots.

A score that is right about which of two images is better can have a gradient that is nearly orthogonal to the way from one to
the other: a small step along it raises the score and nothing else. The image side of Sim and Kim, "Reward Sharpness-Aware
Fine-Tuning for Diffusion Models" (CVPR 2026), takes the gradient where the score is lowest within such a step.
"""

import torch

from acpo_utils.evaluators.loading import part_scores
from acpo_utils.evaluators.protocol import Evaluator


GRADIENT_SCALE = 1024.0  # fp16's gradients would vanish; of the gradient the signs alone are used


def guide_score(
    evaluator: Evaluator,
    images: torch.Tensor,
    prompts: list[str] | None,
    perturbation: float = 0.0,
    clean_weight: float = 0.5,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Q of eq. 6 as the mean of the clean score and the worst one: C Q(x) + (1 - C) Q(x - e sign grad Q(x)).

    Args:
        images: (B, 3, H, W) in [0, 1]. prompts: B strings, or None, as the evaluator takes them.
        perturbation: e, in 255ths; 0 is the clean score alone, as in the paper. clean_weight: C, in [0, 1].
    Returns:
        (B,) in (0, 1), to train by; the perturbation carries no gradient. And what to log of it: with a perturbation
        `clean_score` (B,), and `score_fall` (B,), how far below it the worst one is; of several evaluators each one's own.
    """
    if not perturbation:
        scores = evaluator.score(images, prompts)
        return scores, part_scores(evaluator)
    worst_scores = evaluator.score(worst_point(evaluator, images, prompts, perturbation), prompts)  # (B,)
    with torch.set_grad_enabled(torch.is_grad_enabled() and clean_weight > 0):
        clean_scores = evaluator.score(images, prompts)  # (B,); last, as several guides keep the last call's parts
    scores = clean_weight * clean_scores + (1 - clean_weight) * worst_scores
    logged = {"clean_score": clean_scores.detach(), "score_fall": (clean_scores - worst_scores).detach()}
    return scores, logged | part_scores(evaluator)


def worst_point(
    evaluator: Evaluator, images: torch.Tensor, prompts: list[str] | None, perturbation: float
) -> torch.Tensor:
    """`images` (B, 3, H, W) moved by one signed step of `perturbation` 255ths down the score, inside [0, 1].

    The step is a constant: the gradient goes to `images` alone, and not where it left [0, 1].
    """
    with torch.enable_grad():
        inputs = images.detach().requires_grad_(True)
        total = evaluator.score(inputs, prompts).float().sum()
        (gradient,) = torch.autograd.grad(GRADIENT_SCALE * total, inputs)
    return signed_step(images, gradient, -perturbation)


def signed_step(images: torch.Tensor, gradient: torch.Tensor, size: float) -> torch.Tensor:
    """`images` (B, 3, H, W) in [0, 1], each value moved by `size` 255ths along the sign of `gradient`, inside [0, 1].

    Up the score whose gradient it is, and down it if `size` is negative. Whole numbers make an image of 8 bits one of 8 bits
    again.
    """
    return (images + size / 255 * gradient.sign()).clamp(0, 1)
