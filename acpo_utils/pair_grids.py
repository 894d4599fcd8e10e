"""Pictures of pairs, as in the paper's figures: base over fine-tuned, the prompt under them, never only the best."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from acpo_utils.checkpoints import atomic_write


def choose_pairs(changes: Sequence[float], count: int, seed: int = 0) -> dict[str, list[int]]:
    """Which pairs to show: {"gains": largest first, "losses": largest first, "random": a draw by `seed`}.

    `changes`: (n,) for each pair, positive is better. Gains are at most the pairs that gained, losses those that lost.
    """
    changes = np.asarray(changes, dtype=np.float64)
    order = np.argsort(-changes, kind="stable")
    gains = [int(i) for i in order if changes[i] > 0][:count]
    losses = [int(i) for i in order[::-1] if changes[i] < 0][:count]
    draw = np.random.default_rng(seed).permutation(len(changes))[:count]
    return {"gains": gains, "losses": losses, "random": sorted(draw.tolist())}


def pair_grid(
    path: str | Path,
    title: str,
    pairs: Sequence[tuple[str | Path, str | Path]],
    captions: Sequence[str],
    columns: int = 6,
) -> None:
    """Writes a PNG of `pairs` (base's file, fine-tuned's file), base on top, with their captions under them.

    Raises ValueError if there is no pair.
    """
    from matplotlib.figure import Figure

    if not pairs:
        raise ValueError("expected at least one pair of images, found none")
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(max(1.9 * columns, 4), 4.2 * rows + 0.4), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (pair, caption) in enumerate(zip(pairs, captions)):
        for k, file in enumerate(pair):
            axis = axes[2 * (i // columns) + k, i % columns]
            with Image.open(file) as image:
                axis.imshow(np.asarray(image), interpolation="nearest")
            if i % columns == 0:
                label = ("base", "fine-tuned")[k]
                axis.text(
                    -0.05, 0.5, label, transform=axis.transAxes, ha="right", va="center", rotation=90, fontsize=7
                )
        lines = [line for part in caption.split("\n") for line in textwrap.wrap(part, 28)[:3]]
        # A prompt may hold a $, which matplotlib would take for the beginning of a formula.
        text = "\n".join(lines).replace("$", r"\$")
        axis.text(0.5, -0.04, text, transform=axis.transAxes, ha="center", va="top", fontsize=7)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight")  # the last captions reach below the axes
