"""The faces and the photograph crops for unconditional models: what the shipped files promise, and their rebuilding."""

import hashlib
import io
import runpy
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage

from tests import REPOSITORY


DEMO = REPOSITORY / "examples/demo"
FACES = DEMO / "faces"


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_shipped_faces_are_small_rgb_and_all_different(tmp_path):
    splits = load_dataset(str(FACES), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3000, "validation": 300}
    assert sum(path.stat().st_size for path in FACES.iterdir()) < 8e6
    files = []
    for rows in splits.values():
        assert rows.column_names == ["image", "style", "seed"] and isinstance(rows.features["image"], Image)
        undecoded = rows.cast_column("image", Image(decode=False))
        files += [cell["bytes"] for cell in undecoded["image"]]
    assert len(set(files)) == 3300
    for content in files[::300]:
        image = PILImage.open(io.BytesIO(content))
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_faces_readme_names_author_and_licence_of_each_style(tmp_path):
    rows = load_dataset(
        "parquet", data_files=str(FACES / "validation.parquet"), split="train", cache_dir=str(tmp_path)
    )
    readme = (FACES / "README.md").read_text()
    for style in set(rows["style"]):
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| `{style}` | [")]
        assert line.count("](https://") == 3 and ("CC BY 4.0" in line or "CC0" in line)


def test_faces_are_rebuilt_bit_for_bit(tmp_path):
    pytest.importorskip("dicebear")
    pytest.importorskip("dicebear_styles")
    pytest.importorskip("resvg_py")
    script = runpy.run_path(str(DEMO / "build_faces.py"))
    for folder in ("first", "second"):
        script["main"](Namespace(output_dir=tmp_path / folder, train_faces=2, validation_faces=1, seed=0))
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second") and len(hashes(tmp_path / "first")) == 4
    built = load_dataset("parquet", data_files=str(tmp_path / "first/train.parquet"), split="train")
    shipped = load_dataset("parquet", data_files=str(FACES / "train.parquet"), split="train")
    by_seed = {seed: i for i, seed in enumerate(shipped["seed"])}
    for row in built:
        assert np.array_equal(np.array(row["image"]), np.array(shipped[by_seed[row["seed"]]]["image"]))


def test_photo_crops(tmp_path):
    """Two photographs, blocks beside a flat area: crops have contrast, are of the right photograph, and the same again."""
    script = runpy.run_path(str(DEMO / "build_photo_crops.py"))
    rng = np.random.default_rng(0)
    colours = {"red": (255, 0, 0), "green": (0, 255, 0)}
    rows = []
    for name, colour in colours.items():
        pixels = np.tile(np.array(colour, dtype=np.uint8), (384, 500, 1))
        shades = rng.choice([0.2, 1.0], (12, 8, 1)).repeat(32, 0).repeat(32, 1)
        pixels[:, :256] = (pixels[:, :256] * shades).astype(np.uint8)
        rows.append({"image": PILImage.fromarray(pixels), "name": name})
    photos = tmp_path / "photos"
    photos.mkdir()
    for split in ("train", "validation"):
        Dataset.from_list(rows, features=Features({"image": Image(), "name": Value("string")})).to_parquet(
            photos / f"{split}.parquet"
        )
    for folder in ("first", "second"):
        script["main"](Namespace(photo_dir=photos, output_dir=tmp_path / folder, seed=0))
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")
    splits = load_dataset(str(tmp_path / "first"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(part) for split, part in splits.items()} == {"train": 140, "validation": 34}
    for row in splits["train"]:
        image = np.array(row["image"])
        right, wrong = (0, 1) if row["photo"] == "red" else (1, 0)
        assert image.shape == (64, 64, 3) and image[..., right].max() > 200 and image[..., wrong].max() < 20
    flat = [row for row in splits["train"] if np.array(row["image"].convert("L")).std() < script["LEAST_CONTRAST"]]
    assert len(flat) < 14  # a third of all places are flat
    assert sorted(set(splits["train"]["scale"])) == [96, 160, 256]
    with pytest.raises(SystemExit, match="error: expected .*train.parquet, as build_photos.py writes it"):
        script["main"](Namespace(photo_dir=tmp_path / "nowhere", output_dir=tmp_path, seed=0))
