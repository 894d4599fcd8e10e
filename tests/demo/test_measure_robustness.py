"""The demo's script that measures a trained evaluator, on rated pictures and on pictures that its pipeline draws."""

import json

import measure_robustness as script
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from acpo_utils.evaluators import TwoStreamIQA
from tests.scripts.test_train_iqa_twostream import rated_rows


@pytest.fixture
def evaluator(tmp_path):
    torch.manual_seed(0)
    TwoStreamIQA(widths=(4, 6, 8, 8), fusion_width=8).save_pretrained(tmp_path / "evaluator")
    return f"two-stream:{tmp_path / 'evaluator'}"


def measure(tmp_path, *words):
    script.main(script.parse_args([*map(str, words), "--output_file", str(tmp_path / "found.json")]))
    return json.loads((tmp_path / "found.json").read_text())


def test_of_rated_pictures(evaluator, tmp_path, capsys):
    features = Features({"image": Image(), "mos": Value("float64"), "part": Value("string")})
    Dataset.from_list(rated_rows(6, seed=1), features=features).to_parquet(tmp_path / "test.parquet")
    words = ["--evaluator", evaluator, "--ratings", tmp_path / "test.parquet", "--max_samples", 4]
    found = measure(tmp_path, *words)
    assert found["robustness"]["count"] == 4 and found["direction"]["all"] is None
    assert "| test | 4 | 2 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected a parquet file of rated images, found no"):
        measure(tmp_path, "--ratings", tmp_path / "none.parquet")


def test_of_what_the_pipeline_draws(evaluator, tmp_path):
    found = measure(tmp_path, "--evaluator", evaluator, "--generated", 2, "--num_inference_steps", 1)
    assert found["robustness"]["count"] == found["direction"]["count"] == 2
    assert -1 < found["direction"]["high"] < 1
    with pytest.raises(ValueError, match="--generated: expected 2 to "):
        measure(tmp_path, "--generated", 1)
