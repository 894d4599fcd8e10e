"""Metrics that are not scores of one image: distances between sets of images, and the error of the model's prediction.

Images are files, read batch by batch: (B, 3, H, W) uint8 as the networks of torchmetrics want them.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from acpo_utils.data.pictures import to_rgb
from acpo_utils.evaluators.efficientnet import EfficientNetFeatures, extract_features
from acpo_utils.files import no_pickles, one_line, package_folder


EFFICIENTNET_KID = "KID on EfficientNet-Lite features"  # the name of its row in every table
KERNEL_ROWS = 256  # of KID's kernel in memory at a time
LAST_LAYER = 1280  # the first of `EfficientNetFeatures`' columns; the others are of earlier layers


def read_images(files: Sequence[Path], batch_size: int = 32) -> Iterator[torch.Tensor]:
    """The images of `files`, all of one size, as (B, 3, H, W) uint8, in order.

    Raises ValueError naming the first file that cannot be read or has another size than those before it.
    """
    shape = None
    for start in range(0, len(files), batch_size):
        batch = []
        for file in files[start : start + batch_size]:
            try:
                with Image.open(file) as image:
                    batch.append(torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1))
            except (OSError, SyntaxError, ValueError) as error:  # ValueError: of `to_rgb`
                raise ValueError(f"Image {file} cannot be read: {one_line(error)}") from error
            shape = shape or batch[-1].shape
            if batch[-1].shape != shape:
                height, width = shape[1:]
                raise ValueError(f"Image {file}: expected {width} x {height} pixels as in the files before it.")
        yield torch.stack(batch)


@torch.no_grad()
def image_features(network: torch.nn.Module, files: Sequence[Path], device, batch_size: int = 32) -> torch.Tensor:
    """`network` on (B, 3, H, W) uint8 images, (N, D) in fp32 on the CPU."""
    return torch.cat([network(batch.to(device)).float().cpu() for batch in read_images(files, batch_size)])


def inception(feature: str, device) -> torch.nn.Module:
    """Inception v3 as FID's authors used it: `feature` "2048" for FID and KID, "logits_unbiased" for IS.

    torchmetrics has the network, torch-fidelity its weights, which are downloaded when they are first used.

    Raises ImportError, with the pip command, if a package is missing, and ValueError if the weights cannot be had.
    """
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        with no_pickles():
            return NoTrainInceptionV3("inception-v3-compat", [feature]).to(device)
    except ImportError as error:
        raise ImportError("Inception's weights need two packages: pip install torchmetrics torch-fidelity") from error
    except (OSError, RuntimeError) as error:  # network, a damaged file
        raise ValueError(f"Inception's weights cannot be loaded: {one_line(error)}") from error


def fid(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Frechet Inception Distance (Heusel et al. 2017) between two sets of features, by torchmetrics. 0 is best.

    Args:
        real: (N, D). generated: (M, D). With fewer images than D the covariances are singular and the value is biased
            upwards: compare only sets of equal size.
    Raises:
        ValueError: for fewer than 2 rows, or features of different width.
        ImportError: if torchmetrics is not installed.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if real.ndim != 2 or real.shape[1:] != generated.shape[1:] or min(len(real), len(generated)) < 2:
        shapes = f"{tuple(real.shape)} and {tuple(generated.shape)}"
        raise ValueError(f"FID needs two feature matrices of one width with at least 2 images each, found {shapes}")
    network = torch.nn.Identity()
    network.num_features = real.shape[1]
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int = 0) -> float:
    """Inception Score (Salimans et al. 2016): the mean over `splits` of exp E KL(p(y|x) || p(y)), by torchmetrics.

    Args:
        logits: (N, classes), N >= `splits`. At least 1, at most the number of classes; higher is better.
    Raises:
        ValueError: for fewer images than splits. ImportError: if torchmetrics is not installed.
    """
    from torchmetrics.image.inception import InceptionScore

    if len(logits) < splits:
        raise ValueError(f"IS needs at least {splits} images, one for each of its splits, found {len(logits)}")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `InceptionScore` will save all")
        warnings.filterwarnings("ignore", message=r"std\(\): degrees of freedom")  # of one split
        torch.manual_seed(seed)  # the splits are drawn from the global generator, which fork_rng puts back
        metric = InceptionScore(feature=torch.nn.Identity(), splits=splits)
        metric.update(logits.double())
        return metric.compute()[0].item()


def kid(real: torch.Tensor, generated: torch.Tensor, subsets: int = 50, seed: int = 0) -> tuple[float, float]:
    """Kernel Inception Distance (Binkowski et al. 2018) between two sets of features, of whatever network: mean and std.

    torchmetrics computes it, with the usual kernel (x y / D + 1)^3, over random subsets of half the smaller set. It is
    unbiased: 0 on average for two sets from one source, and may come out slightly negative. 0 is best. Numbers of one
    network's features do not compare with those of another's.

    Args:
        real: (N, D). generated: (M, D).
    Raises:
        ValueError: for fewer than 4 rows, or features of different width.
        ImportError: if torchmetrics is not installed.
    """
    package_folder("torchmetrics", "pip install torchmetrics")
    from torchmetrics.image.kid import KernelInceptionDistance

    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        shapes = f"{tuple(real.shape)} and {tuple(generated.shape)}"
        raise ValueError(f"expected two feature matrices of the same width, found {shapes}")
    if min(len(real), len(generated)) < 4:
        raise ValueError(f"KID needs at least 4 images in each set, found {len(real)} and {len(generated)}")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
        torch.manual_seed(seed)  # the subsets are drawn from the global generator, which fork_rng puts back
        metric = KernelInceptionDistance(
            feature=nn.Identity(), subsets=subsets, subset_size=min(len(real), len(generated)) // 2
        ).set_dtype(torch.float64)
        metric.update(real.double().cpu(), real=True)
        metric.update(generated.double().cpu(), real=False)
        mean, std = metric.compute()
    return mean.item(), std.item()


def efficientnet_kid(
    reference: torch.Tensor, images: torch.Tensor, seed: int = 0, device: str | torch.device | None = None
) -> tuple[float, float]:
    """`kid` of `images` (M, 3, H, W) to `reference` (N, 3, H, W), in [0, 1], on EfficientNet-Lite features: mean and std.

    The features are those that EfficientNet-Lite2 classifies ImageNet by, (N, 1280), as Inception's are for the KID of
    publications: the numbers do not compare with those. 0 is best.

    Raises:
        ValueError: for fewer than 4 images, another shape, or values outside [0, 1].
        ImportError: if EfficientNet's packages or torchmetrics are not installed; the message has the pip command.
    """
    network = EfficientNetFeatures().to(device)
    real, generated = (extract_features(network, part)[:, :LAST_LAYER] for part in (reference, images))
    return kid(real, generated, seed=seed)


def kid_draws(real: torch.Tensor, generated: torch.Tensor, weights: np.ndarray, real_kernel: float) -> np.ndarray:
    """`kid` of all images at once, in place of the mean over subsets, for each row of `weights` over the generated ones.

    An image drawn twice is not compared with itself, so that the estimate stays unbiased. No more than a block of rows of
    the kernel's matrix is in memory.

    Args:
        real: (R, D). generated: (N, D). weights: (draws, N) as `bootstrap_weights` gives them.
        real_kernel: `mean_kernel(real)`.
    Returns:
        (draws,) in fp64.
    """
    real, generated, shares = real.double(), generated.double(), torch.from_numpy(weights)
    within = torch.zeros(len(shares), dtype=torch.float64)
    to_real = []
    for rows in torch.arange(len(generated)).split(KERNEL_ROWS):
        block = _kernel(generated[rows], generated)  # (rows, N)
        block[torch.arange(len(rows)), rows] = 0
        within += (shares[:, rows] * (shares @ block.T)).sum(1)
        to_real.append(_kernel(generated[rows], real).mean(1))
    within /= 1 - shares.square().sum(1)
    return (within - 2 * shares @ torch.cat(to_real) + real_kernel).numpy()


def mean_kernel(features: torch.Tensor) -> float:
    """The mean of KID's kernel over all pairs of different rows of (N, D), N >= 2, in fp64."""
    features, total = features.double(), 0.0
    for rows in torch.arange(len(features)).split(KERNEL_ROWS):
        block = _kernel(features[rows], features)
        block[torch.arange(len(rows)), rows] = 0
        total += block.sum().item()
    return total / (len(features) * (len(features) - 1))


def _kernel(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3
