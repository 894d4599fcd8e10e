"""Pictures of several methods' runs, each measured at several moments: every measure over the time, or over one of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from acpo_utils.ablations.plots import new_panels, save_figure


def plot_curves(
    path: str | Path, curves: dict[str, Sequence[Sequence[dict]]], x: str, measures: dict[str, str], x_label: str
):
    """Writes a picture with a panel for each measure: a faint line for each run, a thick one for a method's mean.

    Args:
        curves: {method: runs, each a list of points {name: number} in order, which have `x` and all of `measures`}. All are
            differences from one base, which is the origin, where every line begins.
        measures: {name: title of its panel}.
    Of a method the runs have as many points each. Returns the matplotlib Figure.
    """
    figure, axes = new_panels(len(measures), 4.0, 3.0)
    for axis, (measure, title) in zip(axes, measures.items()):
        for number, (method, runs) in enumerate(curves.items()):
            color, style = f"C{number % 10}", ("-", "--", ":")[number // 10 % 3]
            lines = [[(0.0, 0.0), *((point[x], point[measure]) for point in run)] for run in runs]
            lines = np.asarray(lines)  # (runs, points, 2)
            for line in lines:
                axis.plot(*line.T, color=color, linestyle=style, linewidth=0.7, alpha=0.35)
            axis.plot(*lines.mean(0).T, color=color, linestyle=style, marker="o", markersize=3, label=method)
        axis.axhline(0, color="grey", linewidth=0.6)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x_label, fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return save_figure(figure, path)
