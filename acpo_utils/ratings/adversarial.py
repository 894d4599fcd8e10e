"""What makes an evaluator harder to fool while it is trained: attacked images beside the others, and a smaller gradient.

Both are off by default, as in the published recipes. With either, the statistics of batch normalisation stay as they are:
an attack has to be one on the evaluator as it will score, and no image's score may hang on the others of its batch.
"""

from collections.abc import Callable, Sequence

import torch

from acpo_utils.evaluators.worst_point import GRADIENT_SCALE, signed_step


STEP = 1 / 255  # of the finite difference


def is_adversarial(args) -> bool:
    """Whether a training script's arguments ask for one of both."""
    return args.adversarial_epsilon > 0 or args.gradient_norm_weight > 0


def fix_batch_norm(model: torch.nn.Module) -> None:
    """Batch normalisation uses its running statistics, and leaves them as they are, until `model.train()` is called again."""
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.eval()


def gradient_signs(
    model: torch.nn.Module, batch: dict, score: Callable, image_keys: Sequence[str]
) -> dict[str, torch.Tensor]:
    """By name, the sign of each score's gradient in the images of `batch`: of the images' shape, of -1, 0 and 1.

    Args:
        model: not wrapped for several processes, which would wait for a backward pass. batch: the images in [0, 1], under
            `image_keys`, and what else `score(model, batch)` needs for B scores in (0, 1).
    """
    with torch.enable_grad():
        inputs = {key: batch[key].detach().requires_grad_(True) for key in image_keys}
        total = score(model, batch | inputs).float().sum()
        gradients = torch.autograd.grad(GRADIENT_SCALE * total, list(inputs.values()), allow_unused=True)
    # A head that looks at the whole image has no use for crops.
    return {
        key: torch.zeros_like(batch[key]) if gradient is None else gradient.sign()
        for key, gradient in zip(image_keys, gradients)
    }


def with_attacks(batch: dict, signs: dict[str, torch.Tensor], epsilon: float) -> dict:
    """`batch` of B rows three times over: as it is, its images moved up their own score, and down it.

    One step of `epsilon` 255ths along `signs` (`gradient_signs`), inside [0, 1]. An attacked image keeps the label of the
    image: nobody sees the difference. Both signs, since the step that raises the loss is the one away from the label, and
    where the score meets its label that is either.
    """
    images = {
        key: [batch[key], signed_step(batch[key], sign, epsilon), signed_step(batch[key], sign, -epsilon)]
        for key, sign in signs.items()
    }
    return _stacked(batch, images, 3)


def _stacked(batch: dict, images: dict[str, list[torch.Tensor]], times: int) -> dict:
    """`batch` of B rows so many times over, with `images` in place of its own."""
    stacked = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            stacked[key] = torch.cat(images.get(key, [value] * times))
        else:
            stacked[key] = value * times
    return stacked


def gradient_norm(
    model: torch.nn.Module, batch: dict, signs: dict[str, torch.Tensor], score: Callable
) -> torch.Tensor:
    """The L1 norm (B,) of each score's gradient in the images of `batch`, to train by: differentiable once.

    Liu et al., "Defense Against Adversarial Attacks on No-Reference Image Quality Models with Gradient Norm
    Regularization" (CVPR 2024): it bounds what a step of bounded size can do to a score. As there by a finite difference
    along the gradient's own signs, here a central one: |q(x + h s) - q(x - h s)| / (2 h), h = 1/255.

    Args: as of `gradient_signs`, which made `signs`.
    """
    images = {key: [batch[key] + STEP * sign, batch[key] - STEP * sign] for key, sign in signs.items()}
    above, below = score(model, _stacked(batch, images, 2)).float().chunk(2)
    return (above - below).abs() / (2 * STEP)


def adversarial_loss(
    training_step: Callable,
    model: torch.nn.Module,
    batch: dict,
    maps: torch.nn.Module | None,
    *,
    score: Callable,
    image_keys: Sequence[str],
    accelerator,
    args,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of `training_step`, by --adversarial_epsilon over `with_attacks`, so that clean images are a third of it; plus
    --gradient_norm_weight times the mean of `gradient_norm`. And what to log of it, {} or `gradient_norm`.

    Args:
        training_step, score: a training script's. model, maps: as accelerate prepared them.
    """
    plain = accelerator.unwrap_model(model)
    signs = gradient_signs(plain, batch, score, image_keys)
    attacked = with_attacks(batch, signs, args.adversarial_epsilon) if args.adversarial_epsilon else batch
    loss = training_step(model, attacked, maps)
    if not args.gradient_norm_weight:
        return loss, {}
    # After the wrapped model's one pass, which may write to buffers that this one keeps for its gradient.
    norm = gradient_norm(plain, batch, signs, score).mean()
    return loss + args.gradient_norm_weight * norm, {"gradient_norm": norm.detach()}
