"""The picture of what a gain of the guide was worth: which rows it takes, and that it shows them."""

import pytest
from PIL import Image

from acpo_utils.evaluation.gains_plot import change, gains_plot, whiskers


def row(model, metric, finetuned, prompts="held-out", **more):
    return {
        "model": model,
        "prompts": prompts,
        "metric": metric,
        "base_mean": -2.0,
        "finetuned_mean": finetuned,
        "lower_is_better": False,
    } | more


def test_changes_and_their_intervals():
    assert change(row("a", "guide", -1.5)) == pytest.approx(25)
    assert whiskers(row("a", "kid", -1.5)) is None
    interval = {"change": 0.25, "change_low": 0.2, "change_high": 0.4}
    assert whiskers(row("a", "kid", -1.5, **interval)) == [[pytest.approx(5)], [pytest.approx(15)]]


def test_a_point_for_each_model_in_each_metric(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    points = []
    errorbar = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda axis, x, y, **k: points.append((x, y)) or errorbar(axis, x, y, **k))
    rows = [
        row(model, metric, value) for metric in ("guide", "judge", "swd") for model, value in (("a", -1), ("b", -3))
    ]
    rows.append(row("a", "guide", 5, prompts="another set"))
    rows[2]["real_mean"] = 0.5
    gains_plot(tmp_path / "gains.png", rows)
    assert points == [(50, 50), (-50, -50)] * 2
    with Image.open(tmp_path / "gains.png") as picture:
        assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(2**24)) > 50


@pytest.mark.parametrize(
    "rows",
    [[], [row("a", "guide", 1), row("a", "judge", 1)], [row("a", "guide", 1), row("b", "guide", 2)]],
    ids=["no row", "one model", "one metric"],
)
def test_nothing_to_compare_is_no_picture(tmp_path, rows):
    gains_plot(tmp_path / "gains.png", rows)
    assert not (tmp_path / "gains.png").exists()
