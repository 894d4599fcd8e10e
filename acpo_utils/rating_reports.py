"""How well an evaluator's scores agree with people's ratings: shares of pairs, a scatter plot, tables."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from acpo_utils.checkpoints import atomic_write


def matched_above_mismatched(
    images: Sequence[dict], mismatches: Sequence[str | None], scores: Sequence[float]
) -> dict[str, dict]:
    """Over all pairs (own prompt, wrong prompt) of one picture: the share in which the own prompt scores higher.

    `images`: (n,) undecoded cells {"bytes", "path"}; pictures are told apart by their bytes. `mismatches`: None, "" or
    "none" for a picture's own prompt, otherwise what is wrong with the prompt. Returns {"share", "pairs"} for each kind
    of mismatch and for "any" of them; {} if there is no pair.
    """
    pictures = defaultdict(lambda: ([], []))
    for cell, mismatch, score in zip(images, mismatches, scores):
        key = hashlib.sha256(cell["bytes"] or Path(cell["path"]).read_bytes()).digest()
        if mismatch in (None, "", "none"):
            pictures[key][0].append(score)
        else:
            pictures[key][1].append((mismatch, score))
    wins = defaultdict(list)
    for matched, mismatched in pictures.values():
        for own in matched:
            for kind, score in mismatched:
                wins[kind].append(own > score)
                wins["any"].append(own > score)
    return {kind: {"share": sum(won) / len(won), "pairs": len(won)} for kind, won in sorted(wins.items())}


def save_scatter(
    path: str | Path, mos: Sequence[float], predictions: Sequence[float], scale: Sequence[float], title: str
) -> None:
    """A square picture of `predictions` (n,) over `mos` (n,), both on `scale` (lowest, highest)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    axis.scatter(mos, predictions, s=6, alpha=0.4, linewidths=0)
    axis.plot(scale, scale, color="grey", linewidth=1)
    axis.set(xlabel="mean opinion score", ylabel="prediction", xlim=scale, ylim=scale, aspect="equal", title=title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def agreement_table(parts: dict[str, dict]) -> str:
    """Markdown, one line for each of `parts` (name: `acpo_utils.agreement.agreement`, and pairs where there are any)."""
    lines = [
        "| rows | number | SRCC | PLCC, logistic fit | PLCC | KRCC | RMSE | own prompt above wrong ones |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        shares = [f"{kind} {100 * pair['share']:.1f} %" for kind, pair in part.get("pairs", {}).items()]
        numbers = " | ".join(f"{part[key]:.3f}" for key in ("srcc", "plcc_logistic", "plcc", "krcc", "rmse"))
        lines.append(f"| {name} | {part['count']} | {numbers} | {', '.join(shares)} |")
    return "\n".join(lines)
