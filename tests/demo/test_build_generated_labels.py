"""The demo's labels of its own generator: a distance made a label, and the script as a whole."""

import random
from collections import Counter

import pytest


pytest.importorskip("skimage")

import build_generated_labels as script
import torch
from datasets import Dataset

from acpo_utils.evaluation.diversity import ShiftTolerantLPIPS
from tests.demo.kadid_table import write_kadid_table


def test_the_label_falls_with_the_distance_and_not_below_the_worst():
    assert script.quality(0.0, far=0.4, best=4.6) == 4.6
    assert script.quality(0.2, far=0.4, best=4.6) == pytest.approx(2.8)
    assert script.quality(0.4, far=0.4, best=4.6) == script.quality(0.9, far=0.4, best=4.6) == script.WORST


def test_kinds_come_in_their_shares():
    kinds = Counter(script.draw_kinds(4000, random.Random(0)))
    for kind, share in script.KINDS.items():
        assert kinds[kind] / 4000 == pytest.approx(share, abs=0.03)


def test_mixtures_lie_between_and_real_ones_stay(monkeypatch):
    """A pipeline that draws black, beside white drawings."""
    monkeypatch.setattr(script, "sample_images", lambda _, prompts, *args, **more: torch.zeros(len(prompts), 3, 4, 4))
    real = torch.ones(60, 3, 4, 4)
    pictures, told = script.make_pictures(None, ["a caption"] * 60, real, 0, random.Random(0))
    brightness = pictures.mean((1, 2, 3)).tolist()
    for value, text in zip(brightness, told):
        if text == "none":
            assert value == 1
        elif text.startswith("generated"):
            assert value == 0
        else:
            assert text.startswith("mixture") and 0.2 <= value <= 0.8
    assert len({text.split(",")[0] for text in told}) == 3


def test_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "STEPS", (1, 2))
    write_kadid_table(tmp_path / "packages")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    words = ["--output_dir", str(tmp_path / "made"), "--train_images", "6", "--test_images", "2"]
    script.main(script.parse_args(words))
    rows = Dataset.from_parquet(str(tmp_path / "made" / "train.parquet"))
    assert len(rows) == 12 and set(rows["source"]) == {"generator"} and set(rows["reference"]) == {None}
    test = Dataset.from_parquet(str(tmp_path / "made" / "test.parquet"))
    assert len(test) == 10
    lpips = ShiftTolerantLPIPS("alex")
    for row in test:
        if row["mismatch"] == "none":
            pictures = [script.pil_to_tensor(row[name])[None] / 255 for name in ("image", "reference")]
            distance = script.distances(lpips, *pictures).item()
            assert (distance < 1e-6) == (row["distortion"] == "none")
            assert (row["mos"] == pytest.approx(script.quality(0, 1, 3.825), abs=0.02)) == (
                row["distortion"] == "none"
            )

    # Among the rows of another folder, told apart by their source.
    (tmp_path / "labels").mkdir()
    for split in script.SPLITS:
        rows = Dataset.from_parquet(str(tmp_path / "made" / f"{split}.parquet")).remove_columns("source")
        rows.to_parquet(tmp_path / "labels" / f"{split}.parquet")
    words = ["--output_dir", str(tmp_path / "both"), *words[2:], "--labels", str(tmp_path / "labels")]
    script.main(script.parse_args(words))
    both = Dataset.from_parquet(str(tmp_path / "both" / "train.parquet"))
    assert Counter(both["source"]) == {"drawing": 12, "generator": 12}


def test_a_folder_without_labels_is_refused_before_anything_is_drawn(tmp_path):
    words = ["--output_dir", str(tmp_path / "made"), "--labels", str(tmp_path)]
    with pytest.raises(ValueError, match="expected a folder that build_labels.py wrote, found no train.parquet"):
        script.main(script.parse_args(words))
    assert not (tmp_path / "made").exists()
