"""Judges by name, and the one that compares with the real image of the same prompt."""

import io
import json

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from acpo_utils.evaluation.diversity import ShiftTolerantLPIPS
from acpo_utils.evaluation.judges import load_judges
from acpo_utils.evaluation.sampling import score_images
from tests.launching import EXAMPLES, refused, run_script


PROMPTS = ["a wall", "a door", "a wall", "a roof"]
COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40)]
SCRIPT = EXAMPLES / "train_acpo_lora_sd.py"


def png(colour, side=48):
    image = Image.new("RGB", (side, side), colour)
    image.paste((255 - colour[0], 128, 0), (side // 4, side // 4, side // 2, side // 2))
    file = io.BytesIO()
    image.save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def prompt_file(tmp_path):
    table = pyarrow.table({"text": PROMPTS, "image": [png(colour) for colour in COLOURS]})
    parquet.write_table(table, tmp_path / "prompts.parquet")
    return tmp_path / "prompts.parquet"


@pytest.fixture
def judge(prompt_file):
    pytest.importorskip("stlpips_pytorch")
    (judge,) = load_judges(["st-lpips:alex"], "cpu", PROMPTS, prompt_file).values()
    return judge


def real_images(side=48):
    cells = [Image.open(io.BytesIO(png(colour)["bytes"])).resize((side, side)) for colour in COLOURS]
    return torch.stack(
        [torch.tensor(list(cell.tobytes())).view(side, side, 3).permute(2, 0, 1) / 255 for cell in cells]
    )


def test_judges_are_named_and_unknown_ones_refused(tmp_path):
    assert list(load_judges(["python:tests.guides:darkness"])) == ["judge"]
    two = load_judges(["python:tests.guides:darkness", "python:tests.guides:brightness"])
    assert list(two) == ["judge python-tests.guides-darkness", "judge python-tests.guides-brightness"]
    images = torch.full((2, 3, 4, 4), 0.25)
    assert [judge.score(images)[0].item() for judge in two.values()] == [0.75, 0.25]
    assert load_judges([]) == {}
    with pytest.raises(ValueError, match="found no judge.json in"):
        load_judges([f"judge:{tmp_path}"])
    with pytest.raises(ValueError, match="unknown kind 'fid'"):
        load_judges(["fid:x"])


def test_a_real_image_scores_one_and_another_less(judge):
    real = real_images()
    scores = judge.score(real, PROMPTS)
    assert scores[[0, 1, 3]] == pytest.approx(1.0, abs=1e-6)
    expected = 1 - ShiftTolerantLPIPS("alex")(real[2:3], real[:1])  # of one text twice the first image counts
    assert scores[2].item() == pytest.approx(expected.item(), abs=1e-6) and scores[2] < 0.99
    noise = 0.1 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    noisy = judge.score((real + noise).clamp(0, 1), PROMPTS)
    assert (noisy[[0, 1, 3]] < scores[[0, 1, 3]]).all()


def test_prompts_in_any_order_and_images_of_another_size(judge):
    real = real_images()
    assert judge.score(real[[3, 1]], ["a roof", "a door"]) == pytest.approx(1.0, abs=1e-6)
    larger = score_images(judge, real_images(64), PROMPTS, "cpu", batch_size=3)
    assert larger.shape == (4,) and larger[0] > larger[2]  # resized by two filters: not quite 1
    assert set(judge.real) == {(48, 48), (64, 64)}


@pytest.mark.parametrize("rows", [None, 3])
def test_prompts_without_images_are_refused(tmp_path, prompt_file, rows):
    """A file of another kind, and one whose last cell is empty."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    if rows is not None:
        file = prompt_file
        images = [png(colour) for colour in COLOURS[:rows]] + [None]
        parquet.write_table(pyarrow.table({"text": PROMPTS, "image": images}), file)
    with pytest.raises(ValueError, match=f"found {rows or 0} images of 4 prompts") as error:
        load_judges(["st-lpips:vgg"], "cpu", PROMPTS, file)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="found 0 images of 0 prompts in None"):
        load_judges(["st-lpips:vgg"], "cpu")


def test_a_training_judged_by_its_real_images(sd_flags, prompt_file, tmp_path):
    pytest.importorskip("stlpips_pytorch")
    options = {
        "evaluator": "python:tests.guides:brightness",
        "judge": ["st-lpips:alex"],
        "num_inference_steps": 2,
        "max_train_steps": 2,
        "validation_steps": 1,
        "num_validation_prompts": 3,
    }
    flags = sd_flags(**options, eval_prompts=prompt_file)
    run_script(SCRIPT, *flags)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    found, panel = metrics["comparisons"]["judge"], metrics["panel"]["st-lpips:alex"]
    assert found["n"] == 4 and 0 < found["finetuned_mean"] < 1 and panel["n"] == 4
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    message = refused(SCRIPT, *sd_flags(**options, eval_prompts=tmp_path / "prompts.txt"))
    assert "needs --eval_prompts from a parquet file with an image in each row" in message
