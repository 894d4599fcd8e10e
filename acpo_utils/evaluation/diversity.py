"""Shift-tolerant LPIPS (ST-LPIPS): how different two images look, as people judged it.

Ghildyal and Liu, "Shift-tolerant Perceptual Similarity Metric", 2022: LPIPS (Zhang et al. 2018) with blurred pooling,
so that a shift by a few pixels counts for little; its numbers do not compare with those of LPIPS. Networks and heads are
in the package `stlpips-pytorch`. Only its weights are read: its code imports packages that it does not declare, and its
pooling is licensed for noncommercial use.
"""

from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from acpo_utils.evaluators.efficientnet import check_batch
from acpo_utils.files import package_folder


DIVERSITY = "diversity (shift-tolerant LPIPS)"  # the name of its row in every table
STLPIPS_PIP = "pip install stlpips-pytorch==0.0.2"


class BlurPool(nn.Module):
    """Halves height and width of (B, C, H, W) after a 3 x 3 binomial blur, reflected at the edges."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("filt", torch.empty(channels, 1, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


def _alexnet() -> list[list[nn.Module]]:
    def convolution(inputs: int, outputs: int, size: int = 3, padding: int = 1) -> nn.Module:
        return nn.Conv2d(inputs, outputs, size, padding=padding)

    return [
        [convolution(3, 64, 11, 2), BlurPool(64), nn.ReLU()],
        [nn.MaxPool2d(3, 1), BlurPool(64), convolution(64, 192, 5, 2), nn.ReLU()],
        [nn.MaxPool2d(3, 1), BlurPool(192), convolution(192, 384), nn.ReLU()],
        [convolution(384, 256), nn.ReLU()],
        [convolution(256, 256), nn.ReLU()],
    ]


def _vgg() -> list[list[nn.Module]]:
    stages, inputs = [], 3
    for outputs, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        stage = [nn.MaxPool2d(2, 1), BlurPool(inputs)] if stages else []
        for _ in range(convolutions):
            stage += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        stages.append(stage)
    return stages


class ShiftTolerantLPIPS(nn.Module):
    """ST-LPIPS distance of two batches of images, (B, 3, H, W) in [0, 1] each -> (B,). 0 for equal ones, about 1 at most.

    Args:
        network: "alex", the smaller and quicker, or "vgg". Their distances do not compare.
    Raises:
        ImportError: if the package is not installed; the message has the pip command.
    """

    def __init__(self, network: str = "alex"):
        super().__init__()
        file = package_folder("stlpips_pytorch", STLPIPS_PIP) / f"weights/vST0.0/{network}_shift_tolerant.pth"
        stages, number = {}, 0
        for k, layers in enumerate({"alex": _alexnet, "vgg": _vgg}[network](), start=1):
            stages[f"slice{k}"] = nn.Sequential(OrderedDict((str(number + i), x) for i, x in enumerate(layers)))
            number += len(layers)  # the layers are numbered on from stage to stage
        self.net = nn.ModuleDict(stages)
        weights = torch.load(file, map_location="cpu", weights_only=True)
        for k in range(len(stages)):
            self.register_buffer(f"head{k}", weights.pop(f"lin{k}.model.1.weight"))  # (1, C, 1, 1)
        for name in ("shift", "scale"):
            self.register_buffer(name, weights.pop(f"scaling_layer.{name}"))  # (1, 3, 1, 1)
        self.net.load_state_dict({name.removeprefix("net."): weight for name, weight in weights.items()})
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What each of the five stages makes of `images`, (B, C, h, w)."""
        x = (images.to(self.shift) * 2 - 1 - self.shift) / self.scale
        x = x.contiguous(memory_format=torch.channels_last)  # convolutions then take two thirds of the time on a CPU
        stages = []
        for stage in self.net.values():
            x = stage(x)
            stages.append(x)
        return stages

    def distance(self, first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
        """The distance (B,) of images whose `stages` are `first` and `second`."""
        distance = torch.zeros(len(first[0]), device=self.shift.device)
        for k, (a, b) in enumerate(zip(first, second)):
            a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))  # of length 1 at every pixel
            distance = distance + F.conv2d((a - b) ** 2, self.get_buffer(f"head{k}")).mean((1, 2, 3))
        return distance

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return self.distance(self.stages(first), self.stages(second))


@torch.no_grad()
def lpips_diversity(
    images: torch.Tensor,
    seed: int = 0,
    pairs: int = 1000,
    network: str = "alex",
    device: str | torch.device | None = None,
    batch_size: int = 32,
) -> tuple[float, float]:
    """Mean shift-tolerant LPIPS distance of random pairs of `images` (N, 3, H, W) in [0, 1], and its standard error.

    0 if all images are the same. Two sets of N images are compared on the same pairs.

    Args:
        pairs: how many, at most N floor((N - 1) / 2); see `random_pairs`. network: "alex" or "vgg".
    Raises:
        ValueError: for fewer than 4 images, another shape, or values outside [0, 1].
        ImportError: if the package with the networks is not installed; the message has the pip command.
    """

    check_batch(images)
    if len(images) < 4:
        raise ValueError(f"LPIPS diversity needs at least 4 images, found {len(images)}")
    drawn = random_pairs(len(images), pairs, seed)  # (P, 2)
    lpips = ShiftTolerantLPIPS(network).to(device)
    distances = [lpips(*images[rows].unbind(1)) for rows in torch.from_numpy(drawn).split(batch_size)]
    return mean_over_pairs(torch.cat(distances).double().cpu().numpy(), drawn)


def random_pairs(n: int, pairs: int, seed: int) -> np.ndarray:
    """`pairs` different pairs of `n` rows, at most n floor((n - 1) / 2) of them, as (P, 2) row numbers.

    The rows are put in a circle in random order; each is paired with its neighbour, then with the next but one, and so
    on, so that every row is used about equally often.
    """
    order = np.random.default_rng(seed).permutation(n)
    first = np.arange(min(pairs, n * ((n - 1) // 2)))
    return np.stack([order[first % n], order[(first + 1 + first // n) % n]], axis=1)


def mean_over_pairs(distances: np.ndarray, pairs: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of `distances` (P,) between the rows `pairs` (P, 2).

    Pairs that share a row are not independent: their covariances count too (dyadic cluster-robust variance; Aronow,
    Samii and Assenova 2015). For pairs that share none it is the usual standard error. Each of the n rows, at least 4,
    has to be in about as many pairs as any other.
    """
    errors = distances - distances.mean()  # (P,)
    rows, index = np.unique(pairs, return_inverse=True)  # (n,), (P, 2)
    sums = np.bincount(index.ravel(), np.repeat(errors, 2))  # (n,), of the errors of each row's pairs
    squares = (errors**2).sum()
    variance = max((sums**2).sum() - squares, squares) / len(errors) ** 2
    variance /= 1 - 4 / len(rows) + 1 / len(errors)  # what the errors lose to the mean's own, n - 1 in the usual one
    return float(distances.mean()), float(np.sqrt(variance))
