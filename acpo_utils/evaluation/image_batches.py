"""Images of a set, batch by batch: a tensor of them, or files that are read when they are needed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from acpo_utils.evaluation.set_metrics import read_images


Images: TypeAlias = torch.Tensor | Sequence[Path]  # (N, 3, H, W) in [0, 1], or N files of one size
PIXELS = 2**16  # a batch is one image, or so many as have this many pixels: what a network makes of them stays small


def image_batches(images: Images, rows: Sequence[int] | None = None) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(rows, (B, 3, H, W) fp32 in [0, 1] on the CPU), batch by batch, of all images or of those in `rows`.

    Raises ValueError as `read_images` does.
    """
    rows = list(range(len(images)) if rows is None else rows)
    if not rows:
        return
    height, width = take(images, rows[:1]).shape[-2:]
    batch_size = max(1, PIXELS // (height * width))
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        yield chosen, take(images, chosen)


def take(images: Images, rows: Sequence[int]) -> torch.Tensor:
    """The images of `rows`, at least one, as (B, 3, H, W) fp32 in [0, 1] on the CPU."""
    if isinstance(images, torch.Tensor):
        return images[list(rows)].float().cpu()
    return torch.cat(list(read_images([images[row] for row in rows], len(rows)))).float() / 255
