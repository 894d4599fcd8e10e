"""Pictures of pairs: base beside fine-tuned, and the real image of the prompt where there is one."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from acpo_utils.files import atomic_write


def comparison_picture(
    path: str | Path,
    base: torch.Tensor,
    finetuned: torch.Tensor,
    prompts: list[str],
    scores: Sequence[torch.Tensor] | None = None,
    columns: int = 8,
    rows: int = 2,
    real: dict[int, torch.Tensor] | None = None,
) -> None:
    """Writes a PNG of the first `rows` x `columns` pairs, base above fine-tuned above real, prompt above, guide's score below.

    Args:
        base, finetuned: (N, 3, H, W) in [0, 1], same prompts and noise. scores: (base (N,), fine-tuned (N,)).
        real: {row of N: the prompt's real image (3, H, W) in [0, 1]}, where there are any.
    """
    from matplotlib.figure import Figure

    prompts = prompts[: rows * columns]
    rows = -(-len(prompts) // columns)
    shown = [("base", base), ("ACPO", finetuned)] + ([("real", real)] if real else [])
    figure = Figure(figsize=(1.75 * columns, (0.4 + 2.1 * len(shown)) * rows), layout="constrained", dpi=110)
    axes = figure.subplots(len(shown) * rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, prompt in enumerate(prompts):
        for k, (label, images) in enumerate(shown):
            axis = axes[len(shown) * (i // columns) + k, i % columns]
            if label == "real" and i not in images:
                continue
            axis.imshow(images[i].permute(1, 2, 0).numpy(), interpolation="nearest")
            if k == 0:
                axis.set_title("\n".join(textwrap.wrap(prompt, 24)[:3]), fontsize=7)
            caption = label if scores is None or label == "real" else f"{label}  {scores[k][i]:.2f}"
            axis.text(0.5, -0.04, caption, transform=axis.transAxes, ha="center", va="top", fontsize=7)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


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
    pairs: Sequence[Sequence[str | Path | None]],
    captions: Sequence[str],
    columns: int = 6,
) -> None:
    """Writes a PNG of `pairs` (base's file, fine-tuned's file, perhaps the real image's), base on top, captions under them.

    A real image that is None leaves a gap, and where all of them are, there is no row for them.

    Raises ValueError if there is no pair.
    """
    from matplotlib.figure import Figure

    if not pairs:
        raise ValueError("expected at least one pair of images, found none")
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    shown = 3 if any(len(pair) > 2 and pair[2] is not None for pair in pairs) else 2
    figure = Figure(figsize=(max(1.9 * columns, 4), (0.5 + 1.85 * shown) * rows + 0.4), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(shown * rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (pair, caption) in enumerate(zip(pairs, captions)):
        for k, file in enumerate(pair[:shown]):
            axis = axes[shown * (i // columns) + k, i % columns]
            if file is not None:
                with Image.open(file) as image:
                    axis.imshow(np.asarray(image), interpolation="nearest")
            if i % columns == 0:
                label = ("base", "fine-tuned", "real")[k]
                axis.text(
                    -0.05, 0.5, label, transform=axis.transAxes, ha="right", va="center", rotation=90, fontsize=7
                )
        lines = [line for part in caption.split("\n") for line in textwrap.wrap(part, 28)[:3]]
        # A prompt may hold a $, which matplotlib would take for the beginning of a formula.
        text = "\n".join(lines).replace("$", r"\$")
        axis.text(0.5, -0.04, text, transform=axis.transAxes, ha="center", va="top", fontsize=7)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight")  # the last captions reach below the axes


def gains_and_losses(
    folder: str | Path,
    model: str,
    pairs: Sequence[Sequence[str | Path | None]],
    captions: Sequence[str],
    metric: str | None,
    scores: tuple[Sequence[float], Sequence[float]] | None,
    count: int,
    seed: int = 0,
) -> list[Path]:
    """Writes `pair_grid`s of the largest gains, the largest losses and a random draw of `count` pairs each.

    Args:
        folder: of the pictures, which are named after `model`; those of a run before are removed.
        pairs: n as `pair_grid` takes them. captions: n strings.
        metric, scores: what a gain is of, and its (base (n,), fine-tuned (n,)), higher is better; None: a draw alone.
    Returns:
        The pictures' files; none of gains where nothing gained.
    """
    changes = np.zeros(len(pairs)) if scores is None else np.subtract(scores[1], scores[0])
    files = []
    for kind, chosen in choose_pairs(changes, count, seed).items():
        file = Path(folder, f"{model}-{kind}.png")
        file.unlink(missing_ok=True)
        if not chosen:
            continue
        title = f"{model}: {'a random draw' if kind == 'random' else f'largest {kind}'}"
        texts = [captions[i] for i in chosen]
        if scores is not None:
            title += f", {metric} under each"
            texts = [f"{captions[i]}\n{scores[0][i]:.3f} to {scores[1][i]:.3f}" for i in chosen]
        pair_grid(file, title, [pairs[i] for i in chosen], texts)
        files.append(file)
    return files
