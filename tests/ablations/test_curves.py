"""Pictures of several methods' runs over their time."""

import numpy as np

from acpo_utils.ablations.curves import plot_curves


def test_a_line_for_each_run_and_one_for_a_methods_mean(tmp_path):
    runs = [
        [{"seconds": 10, "guide": 0.1, "drift": 1.0}, {"seconds": 20, "guide": 0.3, "drift": 2.0}],
        [{"seconds": 12, "guide": 0.3, "drift": 3.0}, {"seconds": 22, "guide": 0.5, "drift": 4.0}],
    ]
    curves = {"ours": runs, "theirs": runs[:1]}
    figure = plot_curves(
        tmp_path / "over.png", curves, "seconds", {"guide": "guide", "drift": "the drift"}, "CPU seconds"
    )
    assert (tmp_path / "over.png").stat().st_size > 1000
    guide, drift = figure.axes
    assert [guide.get_title(), drift.get_title(), guide.get_xlabel()] == ["guide", "the drift", "CPU seconds"]
    lines = {line.get_label(): line.get_xydata() for line in drift.get_lines()}
    np.testing.assert_allclose(lines["ours"], [[0, 0], [11, 2], [21, 3]])
    np.testing.assert_allclose(lines["theirs"], [[0, 0], [10, 1], [20, 2]])
    faint = [line.get_xydata()[1:].tolist() for line in guide.get_lines() if line.get_alpha()]
    assert faint == [[[10, 0.1], [20, 0.3]], [[12, 0.3], [22, 0.5]], [[10, 0.1], [20, 0.3]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "theirs"]
