import csv
import math

import numpy as np
import pytest

from acpo_utils.evaluation.table import (
    evaluation_notes,
    evaluation_table,
    finish_rows,
    paired_row,
    set_row,
    write_evaluation_tables,
)
from acpo_utils.statistics import paired_comparison


BASE, TUNED = [1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 2.9, 4.8]


def row(values, model="lora", prompts="held-out", metric="judge", guide=False, lower_is_better=False):
    what = {"metric": metric, "guide": guide, "lower_is_better": lower_is_better}
    return {"model": model, "prompts": prompts} | what | values


def test_a_win_is_a_better_score_also_where_lower_is_better():
    up, down = paired_row(BASE, TUNED), paired_row(BASE, TUNED, lower_is_better=True)
    assert up["win_rate"] == 0.75 and down["win_rate"] == 0.25
    assert up["mean_difference"] == down["mean_difference"] == pytest.approx(0.425)
    assert up["p"] == down["p"] and up["win_rate_low"] < 0.75 < up["win_rate_high"]
    assert {k: up[k] for k in ("t", "std_difference")} == {
        k: paired_comparison(BASE, TUNED)[k] for k in ("t", "std_difference")
    }


def test_holm_is_over_the_rows_that_have_a_test():
    rng = np.random.default_rng(0)
    pairs = [(x := rng.normal(size=30), x + rng.normal(shift, 1, size=30)) for shift in (0.9, 0.3)]
    rows = [row(paired_row(*pair)) for pair in pairs]
    rows += [row(paired_row(BASE, BASE)), row(set_row(10.0, 9.0, 30))]
    finished = finish_rows(rows)
    p = sorted(r["p"] for r in finished[:2])
    assert sorted(r["p_holm"] for r in finished[:2]) == pytest.approx([2 * p[0], max(2 * p[0], p[1])])
    assert finished[2]["t"] is finished[2]["p"] is finished[2]["p_holm"] is None, "equal scores have no test"
    assert finished[3]["mean_difference"] == -1.0 and finished[3]["win_rate"] is None
    assert not any(isinstance(v, float) and math.isnan(v) for r in finished for v in r.values())


def results():
    rows = finish_rows(
        [
            row(paired_row(BASE, TUNED), metric="ipce|guide", guide=True),
            row(set_row(10.0, 9.5, 4), metric="fid", lower_is_better=True),
        ]
    )
    return {
        "rows": rows,
        "scores": {"ipce|guide": {"base": BASE, "lora": TUNED}},
        "prompts": [{"set": "held-out", "row": i, "text": f'a "fox", {i}'} for i in range(4)],
        "images": {m: [f"images/{m}/{i}.png" for i in range(4)] for m in ("base", "lora")},
        "unavailable": {"kid": "no weights."},
    }


def test_the_table_lines_up_and_marks_guides_and_directions():
    table = evaluation_table(results()["rows"])
    lines = table.split("\n")
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    assert "ipce\\|guide (guide)" in lines[2] and "75.0 % [30.1, 95.4]" in lines[2] and "+0.4250" in lines[2]
    assert "fid ↓" in lines[3] and "-0.5000" in lines[3] and "–" in lines[3]
    assert "model" not in lines[0] and "prompts" not in lines[0]
    two = finish_rows([row(paired_row(BASE, TUNED), model=m, prompts=m) for m in ("a", "b")])
    assert evaluation_table(two).split("\n")[0].split()[1:5:2] == ["model", "prompts"]


def test_the_files(tmp_path):
    write_evaluation_tables(tmp_path, results())
    text = (tmp_path / "table.md").read_text()
    assert "guide: the model was trained to raise this score" in text and "kid: unavailable. no weights." in text
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["mean_difference"]) == pytest.approx(0.425) and rows[0]["guide"] == "True"
    assert rows[1]["p_holm"] == "" and float(rows[1]["finetuned_mean"]) == 9.5
    with open(tmp_path / "scores.csv", newline="") as file:
        scores = list(csv.DictReader(file))
    assert len(scores) == 8 and [float(s["ipce|guide"]) for s in scores] == BASE + TUNED
    assert scores[5]["text"] == 'a "fox", 1' and scores[5]["image"] == "images/lora/1.png"
    assert "guide" not in evaluation_notes(results() | {"rows": []})
