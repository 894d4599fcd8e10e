"""The pictures of the tests, made from a seed."""

from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage


COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (240, 220, 60)}


def save_captioned_images(folder: Path) -> str:
    """A folder with train.parquet: twelve real-coloured 40 x 36 pictures with captions."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        pixels = np.clip(np.array(colour) + rng.normal(0, 20, (36, 40, 3)), 0, 255).astype(np.uint8)
        rows.append({"image": PILImage.fromarray(pixels), "text": f"a {name} wall {i}"})
    folder.mkdir(parents=True)
    features = Features({"image": Image(), "text": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return str(folder)


def pictures(folder: Path, number: int = 12, size: tuple[int, int] = (36, 40)) -> str:
    """A folder of PNGs: coloured gradients with noise, no two alike."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    ramp = np.linspace(0, 1, size[0])[:, None, None]
    for i in range(number):
        first, last = rng.integers(0, 256, (2, 3))
        pixels = first + (last - first) * ramp + rng.normal(0, 10, (*size, 3))
        PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
    return str(folder)
