"""Images beside the real image of the same caption: pixel distances, and what both show of edges and colour.

SSIM and pixel MSE are measures of distortion. No image is best in them that looks real: a mean of all that a caption allows
would be, blurred as it is (Blau and Michaeli, "The Perception-Distortion Tradeoff", 2018). They are read beside measures of
perception, as KID and SWD are, and a loss in them beside a gain there is what that paper expects of sharper images.
"""

from collections.abc import Sequence

import torch

from acpo_utils.evaluation.image_batches import Images, image_batches, take
from acpo_utils.files import package_folder


LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (Rec. 601)


def pairs_by_caption(prompts: Sequence[str | None], captions: Sequence[str]) -> list[tuple[int, int]]:
    """(row of the prompt, row of the first real image with that text as its caption); prompts without one are left out."""
    first: dict[str, int] = {}
    for row, caption in enumerate(captions):
        first.setdefault(caption.strip(), row)
    texts = [None if prompt is None else prompt.strip() for prompt in prompts]
    return [(row, first[text]) for row, text in enumerate(texts) if text in first]


def ssim(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of two batches (B, 3, H, W) in [0, 1], by torchmetrics: (B,), 1 for equal ones.

    Raises ImportError, with the pip command, if torchmetrics is not installed.
    """
    package_folder("torchmetrics", "pip install torchmetrics")
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(first, second, data_range=1.0, reduction="none").reshape(len(first))


def pixel_mse(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of two batches (B, 3, H, W) in [0, 1]: (B,)."""
    return (first - second).square().mean((1, 2, 3))


def edge_energy(images: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the brightness of neighbouring pixels, along both axes added up: (B, 3, H, W) -> (B,)."""
    brightness = (images * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1)  # (B, H, W)
    return brightness.diff(dim=1).square().mean((1, 2)) + brightness.diff(dim=2).square().mean((1, 2))


def saturation(images: torch.Tensor) -> torch.Tensor:
    """Mean saturation of the pixels as HSV has it, (max - min) / max of the channels, 0 of black: (B, 3, H, W) -> (B,)."""
    low, high = images.aminmax(dim=1)
    return ((high - low) / high.clamp_min(1e-6)).mean((1, 2))


def pair_values(measure, images: Images, real: Images, pairs: Sequence[tuple[int, int]]) -> list[float]:
    """`measure` (of `ssim`'s form) of each image and its real one, in the order of `pairs`: (row, row of the real one)."""
    real_of, values = dict(pairs), []
    for rows, batch in image_batches(images, list(real_of)):
        values += measure(batch, take(real, [real_of[row] for row in rows])).tolist()
    return values


def image_values(measure, images: Images) -> list[float]:
    """`measure` (of `saturation`'s form) of each image."""
    return [value for _, batch in image_batches(images) for value in measure(batch).tolist()]
