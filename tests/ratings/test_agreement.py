"""The logistic fit, agreement by group, and how an evaluator's folder is replaced."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from acpo_utils.ratings.agreement import agreement, agreement_by_group, logistic_fit, logistic_table
from acpo_utils.ratings.best import Best, copy_evaluator, save_evaluator


def test_logistic_fit_undoes_a_logistic():
    x = np.random.default_rng(0).uniform(0, 100, 80)
    y = 20 + 60 / (1 + np.exp(-(x - 40) / 9))
    np.testing.assert_allclose(logistic_fit(x, y), y, atol=1e-4)
    metrics = agreement(x, y)
    assert metrics["srcc"] == pytest.approx(1) and metrics["count"] == 80
    assert metrics["plcc"] == pytest.approx(stats.pearsonr(x, y).statistic) and metrics["plcc"] < 0.97
    assert metrics["plcc_logistic"] == pytest.approx(1, abs=1e-6) and metrics["rmse_logistic"] < 1e-4
    falling = agreement(-x, y)  # a metric of damage: the fit may fall
    assert falling["srcc"] == pytest.approx(-1) and falling["plcc_logistic"] == pytest.approx(1, abs=1e-4)


def test_where_there_is_nothing_to_fit():
    assert logistic_fit([1, 2, 3], [3, 2, 1]).tolist() == [1, 2, 3]
    metrics = agreement([50.0] * 6, [1.0, 2, 3, 4, 5, 6])
    assert np.isnan(metrics["srcc"]) and np.isnan(metrics["plcc_logistic"]) and metrics["rmse"] > 40


def test_groups_and_table():
    groups = agreement_by_group([1.0, 2, 3, 4, 9], [1.0, 2, 4, 3, 9], ["a", "a", "b", "b", "alone"])
    assert list(groups) == ["a", "b"]
    assert groups["a"]["srcc"] == pytest.approx(1) and groups["b"]["srcc"] == pytest.approx(-1)
    lines = logistic_table({"test": groups["a"]}).splitlines()
    assert lines[2] == "| test | 2 | 1.000 | 1.000 | 1.000 | 1.000 | 0.000 | 0.000 |"


def test_an_evaluator_is_replaced_as_a_whole(tmp_path):
    class Model:
        def __init__(self, text):
            self.text = text

        def save_pretrained(self, folder):
            folder.mkdir()
            if self.text is None:
                raise OSError("disk full")
            (folder / "weights").write_text(self.text)

    folder = tmp_path / "best"
    save_evaluator(Model("first"), folder)
    with pytest.raises(OSError):
        save_evaluator(Model(None), folder)
    assert (folder / "weights").read_text() == "first"
    save_evaluator(Model("second"), folder)
    assert (folder / "weights").read_text() == "second"
    (folder / "metrics.json").write_text("{}")
    copy_evaluator(folder, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "weights"]


def test_best_goes_through_a_checkpoint():
    best = Best(2)
    best.step, best.value, best.lines = 7, 0.5, [(1.5, 0.1)]
    loaded = Best()
    loaded.load_state_dict(torch.load(_saved(best), weights_only=True))
    assert vars(loaded) == vars(best)


def _saved(best):
    import io

    buffer = io.BytesIO()
    torch.save(best.state_dict(), buffer)
    buffer.seek(0)
    return buffer


def test_logistic_fit_does_not_depend_on_what_memory_held():
    """glibc fills what it hands out with a given byte: the fit of few rows is the same to the bit, for each of them."""
    program = (
        "import numpy as np; from acpo_utils.ratings.agreement import logistic_fit; rng = np.random.default_rng(0);"
        "print([logistic_fit(rng.random(n) / 100, 100 * rng.random(n)).tobytes().hex() for n in (5, 6, 7, 8) * 20])"
    )
    outputs = set()
    for byte in ("1", "85", "255"):
        environment = os.environ | {"MALLOC_PERTURB_": byte}
        command = [sys.executable, "-c", program]
        outputs.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(outputs) == 1
