"""Numbers of an ablation's table against values worked out by hand and by scipy, and its pictures."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from acpo_utils.ablations.grid import product_rows, sweeps
from acpo_utils.ablations.plots import plot_rows, plot_sweep
from acpo_utils.ablations.table import (
    FIELDS,
    ablation_notes,
    ablation_table,
    mean_interval,
    read_metrics,
    summarise_rows,
    write_ablation_tables,
)


def test_interval_by_hand():
    """1, 2, 4: mean 7/3, variance (16 + 1 + 25) / 9 / 2 = 7/3; the 97.5 % point of t with 2 degrees is .95 / sqrt(2 * .975 * .025)."""
    mean, low, high = mean_interval([1, 2, 4])
    half = 0.95 / math.sqrt(2 * 0.975 * 0.025) * math.sqrt(7 / 3) / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half), rel=1e-9)


def test_interval_is_scipys():
    values = np.random.default_rng(0).normal(3, 2, 9)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((values.mean(), expected.low, expected.high), rel=1e-9)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.8)
    assert mean_interval(values, 0.8)[1:] == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_interval_of_one_value_of_equal_ones_and_of_none():
    assert mean_interval([3.0])[0] == 3 and all(map(math.isnan, mean_interval([3.0])[1:]))
    assert mean_interval([2.0, 2.0]) == (2, 2, 2)
    for values in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="finite"):
            mean_interval(values)


def test_metrics_of_the_ddpm_script(tmp_path):
    """By the function that writes them."""
    from acpo_utils.evaluation.unconditional import MSE, compare_measures, summarise_measures

    base = {"guide": torch.tensor([1.0, 2.0, 6.0]), MSE: torch.tensor([0.25, 0.5])}, {"kid": (0.5, 0.1)}
    tuned = {"guide": torch.tensor([2.0, 4.0, 6.0]), MSE: torch.tensor([0.5, 0.5])}, {"kid": (0.25, 0.1)}
    (tmp_path / "metrics.json").write_text(
        json.dumps({"num_images": 3, "skipped_steps": 0} | compare_measures(base, tuned)[0])
    )
    assert read_metrics(tmp_path / "metrics.json") == {
        "guide": {"base": 3.0, "finetuned": 4.0, "difference": 1.0},
        MSE: {"base": 0.375, "finetuned": 0.5, "difference": 0.125},
        "kid": {"base": 0.5, "finetuned": 0.25, "difference": -0.25},
    }
    (tmp_path / "metrics.json").write_text(json.dumps({"num_images": 3} | summarise_measures(*tuned)[0]))
    expected = {"guide": {"finetuned": 4.0}, MSE: {"finetuned": 0.5}, "kid": {"finetuned": 0.25}}
    assert read_metrics(tmp_path / "metrics.json") == expected


def test_metrics_of_the_lora_script_and_of_others(tmp_path):
    from acpo_utils.statistics import paired_comparison

    file = tmp_path / "metrics.json"
    comparison = paired_comparison([1, 2], [2, 3])  # equal differences: t and p are nan, which json writes as NaN
    file.write_text(json.dumps({"comparisons": {"guide": comparison}, "num_prompts": 2, "skipped_steps": 0}))
    assert read_metrics(file) == {"guide": {"base": 1.5, "finetuned": 2.5, "difference": 1.0}}
    file.write_text(
        json.dumps({"best_step": 7, "test": {"srcc": 0.5, "groups": {"a": 1}}, "bad": float("nan"), "x": "y"})
    )
    assert read_metrics(file) == {"best_step": {"finetuned": 7}, "test srcc": {"finetuned": 0.5}}
    for text in ("{", "[1]", '{"comparisons": {"guide": {}}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="metrics.json is damaged or of unknown form"):
            read_metrics(file)


def value(base, finetuned):
    return {"base": base, "finetuned": finetuned, "difference": finetuned - base}


@pytest.fixture
def lines():
    metrics = {
        "a": [{"guide": value(1.0, 2.0), "kid": value(0.5, 0.5)}, {"guide": value(2.0, 5.0)}],
        "b": [],
        "c": [{"loss": {"finetuned": 0.25}}, {"loss": {"finetuned": 0.75}}],
    }
    return summarise_rows(metrics, {"a": 1, "b": 2})


def test_rows_of_the_table(lines):
    """The differences of a's guide are 1 and 3: mean 2, std sqrt 2, half an interval 12.7062 * sqrt 2 / sqrt 2."""
    half = 12.706204736174694
    guide, kid, none, loss = lines
    assert all(list(line) == list(FIELDS) for line in lines)
    assert [guide[k] for k in ("row", "metric", "runs", "failed")] == ["a", "guide", 2, 1]
    assert (guide["base_mean"], guide["finetuned_mean"], guide["mean_difference"]) == (1.5, 3.5, 2.0)
    assert (guide["interval_low"], guide["interval_high"]) == pytest.approx((2 - half, 2 + half), rel=1e-9)
    assert (kid["runs"], kid["mean_difference"], kid["interval_low"]) == (1, 0.0, None)
    assert (none["row"], none["metric"], none["runs"], none["failed"]) == ("b", None, 0, 2)
    assert (loss["base_mean"], loss["finetuned_mean"], loss["mean_difference"]) == (None, 0.5, None)
    assert loss["interval_low"] == pytest.approx(0.5 - half * 0.25, rel=1e-9), "no base: the interval of the mean"


def test_files_of_the_table(lines, tmp_path):
    text = ablation_table(lines)
    assert len({len(line) for line in text.splitlines()}) == 1, "columns line up"
    assert "| a   | guide  | 1.5000 |     3.5000 |    +2.0000 | [-10.7062, +14.7062] |    2 |      1 |" in text
    below = ablation_notes(lines, {"b,seed=0": "ValueError: no"})
    assert "of the difference, of the mean where there is no base" in below and "Failed: b,seed=0: ValueError" in below
    write_ablation_tables(tmp_path, lines, "title", below, {"seeds": 2})
    assert (tmp_path / "table.md").read_text() == f"title\n\n{text}\n\n{below}\n"
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["table"] == lines and saved["seeds"] == 2
    with open(tmp_path / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert float(table[0]["interval_low"]) == lines[0]["interval_low"] and table[2]["metric"] == ""


def test_small_numbers_keep_their_digits():
    (line,) = summarise_rows({"a": [{"MSE": value(0.0179, 0.01787)}]}, {})
    assert "| 0.0179 |     0.0179 |   -3.0e-05 |" in ablation_table([line])


@pytest.mark.parametrize(
    ("grid", "scale"),
    [
        ("tmax=100,300", "linear"),
        ("quality_weight=0.1,1,100", "log"),
        ("anchor_weight=0,0.1,10", "symlog"),
        ("late_start=data,rollout", "linear"),
    ],
)
def test_pictures(tmp_path, grid, scale):
    """Everything lies within the axes, on an axis that suits the values, and a row without a run does no harm."""
    rows = product_rows([grid, "rank=2,4"])
    metrics = {
        row.name: [{"guide": value(0, i), "kid $": value(0, i + s)} for s in (0, 1)] for i, row in enumerate(rows)
    }
    metrics[rows[-1].name] = []
    lines = summarise_rows(metrics, {})
    flag = grid.partition("=")[0]
    sweep = sweeps(rows)[flag]
    figures = [plot_rows(tmp_path / "rows.png", lines), plot_sweep(tmp_path / "flag.png", flag, sweep, lines)]
    for axis, metric in zip(figures[1].axes, ("guide", "kid $")):
        assert axis.get_xscale() == scale and axis.get_xlabel() == flag
        assert [text.get_text() for text in axis.get_xticklabels()] == grid.partition("=")[2].split(",")
        low, high = axis.get_xlim()
        assert all(low < tick < high for tick in axis.get_xticks())
        low, high = axis.get_ylim()
        ends = [line[name] for line in lines for name in ("interval_low", "interval_high") if line["metric"] == metric]
        assert low < min(ends) and max(ends) < high < max(ends) + (max(ends) - min(ends))
    assert [text.get_text() for text in figures[1].legends[0].get_texts()] == ["rank 2", "rank 4"]
    for name in ("rows.png", "flag.png"):
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10


def test_no_picture_of_nothing(tmp_path):
    assert plot_rows(tmp_path / "none.png", summarise_rows({"a": []}, {})) is None
    assert not (tmp_path / "none.png").exists()
