"""Judges of images without prompts, by which nothing here is trained: BRISQUE, KID and LPIPS diversity.

BRISQUE scores single photographs. KID measures how far a set of images is from real ones, and LPIPS diversity whether
the images of a set still differ: a model that obeys its guide too well makes them alike. The networks come with small
packages of PyPI; each is needed only by the judge that uses it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from acpo_utils.evaluators import load_evaluator
from acpo_utils.judge import EfficientNetFeatures, check_batch, extract_features, kid


BATCH_SIZE = 32
LAST_LAYER = 1280  # the first of `EfficientNetFeatures`' columns; the others are of earlier layers
Score = Callable[[torch.Tensor], torch.Tensor]  # images (N, 3, H, W) in [0, 1] -> (N,), higher is better


def load_judges(names: Sequence[str], device: str | torch.device | None = None) -> dict[str, Score]:
    """Scores of single images by name: functions from (N, 3, H, W) in [0, 1] to (N,) on the CPU, higher is better.

    - "brisque": BRISQUE with its sign changed, so that a clean photograph has about 0 and a spoilt one -50 to -100; of
      the pixels as 8 bits store them;
    - any evaluator that needs no prompts, as `acpo_utils.evaluators.load_evaluator` names it ("pyiqa:maniqa",
      "pyiqa:hyperiqa", "two-stream:PATH"), in its reporting range.

    The functions raise ValueError if the images are not (N, 3, H, W) or leave [0, 1].

    Raises:
        ValueError: in one line, for an unknown name. ImportError: for a package that is not installed; the message
            has the pip command.
    """
    return {name: _brisque() if name == "brisque" else _evaluator(name, device) for name in names}


def _brisque() -> Score:
    from acpo_utils.brisque import Brisque

    brisque = Brisque()

    def score(batch: torch.Tensor) -> torch.Tensor:
        pixels = (batch.clamp(0, 1) * 255).round().to("cpu", torch.uint8).movedim(1, -1).numpy()  # (B, H, W, 3)
        return torch.tensor([brisque(image) for image in pixels])

    return _in_batches(score)


def _evaluator(name: str, device: str | torch.device | None) -> Score:
    evaluator = load_evaluator(name, device)
    low, high = getattr(evaluator, "score_range", (0.0, 1.0))

    def score(batch: torch.Tensor) -> torch.Tensor:
        scores = evaluator.score(batch.to(device, torch.float32).clamp(0, 1))  # (B,) in (0, 1)
        return (low + (high - low) * scores.float()).cpu()

    return _in_batches(score)


def _in_batches(score: Score) -> Score:
    @torch.no_grad()
    def score_all(images: torch.Tensor) -> torch.Tensor:
        check_batch(images)
        return torch.cat([score(batch) for batch in images.split(BATCH_SIZE)])

    return score_all


def kid_to(
    reference: torch.Tensor, images: torch.Tensor, seed: int = 0, device: str | torch.device | None = None
) -> tuple[float, float]:
    """KID (Binkowski et al. 2018) of `images` (M, 3, H, W) to `reference` (N, 3, H, W), in [0, 1]: mean and std.

    On the features that EfficientNet-Lite2 classifies ImageNet by, (N, 1280), as Inception's are: the numbers do not
    compare with those on Inception's. 0 is best; see `acpo_utils.judge.kid`.

    Raises:
        ValueError: for fewer than 4 images, another shape, or values outside [0, 1].
        ImportError: if EfficientNet's packages or torchmetrics are not installed; the message has the pip command.
    """
    network = EfficientNetFeatures().to(device)
    real, generated = (extract_features(network, part, BATCH_SIZE)[:, :LAST_LAYER] for part in (reference, images))
    return kid(real, generated, seed=seed)


@torch.no_grad()
def lpips_diversity(
    images: torch.Tensor,
    seed: int = 0,
    pairs: int = 1000,
    network: str = "alex",
    device: str | torch.device | None = None,
) -> tuple[float, float]:
    """Mean LPIPS distance of random pairs of `images` (N, 3, H, W) in [0, 1], and its standard error.

    0 if all images are the same. Two sets of N images are compared on the same pairs.

    Args:
        pairs: how many, at most N floor((N - 1) / 2); see `random_pairs`. network: "alex" or "vgg".
    Raises:
        ValueError: for fewer than 4 images, another shape, or values outside [0, 1].
        ImportError: if the package with the networks is not installed; the message has the pip command.
    """
    from acpo_utils.lpips import LPIPS

    check_batch(images)
    if len(images) < 4:
        raise ValueError(f"LPIPS diversity needs at least 4 images, found {len(images)}")
    drawn = random_pairs(len(images), pairs, seed)  # (P, 2)
    lpips = LPIPS(network).to(device)
    distances = [lpips(*images[rows].unbind(1)) for rows in torch.from_numpy(drawn).split(BATCH_SIZE)]
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
