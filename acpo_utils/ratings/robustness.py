"""How easily an evaluator is fooled: what a step too small to see does to its scores, and where its gradient points.

An evaluator can rank images as people do and still be a poor guide: a generator follows the gradient of the score, and
that may point anywhere. Both measures are of the evaluator as it is, in fp32, on the images at their own size.
"""

import math
from collections.abc import Sequence

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

from acpo_utils.data import read_image
from acpo_utils.evaluators import Evaluator
from acpo_utils.evaluators.worst_point import signed_step
from acpo_utils.files import one_line
from acpo_utils.statistics import correlation


EPSILONS = (1, 2, 4)  # of 255
FREQUENCIES = ("all", "low", "high")


def rows_to_measure(rows: datasets.Dataset, max_samples: int) -> datasets.Dataset:
    """At most `max_samples` of `rows`, in order: a random choice, and the same one for every evaluator."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:max_samples]
    return rows.select(sorted(chosen.tolist()))


def check_originals(rows: datasets.Dataset, image_column: str, reference_column: str) -> None:
    """Raises ValueError, in one line, unless every original in `reference_column` is an image of the size of its own.

    Args:
        rows: with undecoded images in both columns. A row without an original is None there. No such column: nothing is
            checked.
    """
    if reference_column not in rows.column_names:
        return
    for row in rows.select_columns([image_column, reference_column]):
        if row[reference_column] is None:
            continue
        name = row[image_column].get("path") or "an image of the test rows"
        where = f"--reference_column {reference_column}, the original of {one_line(name)}"
        size = read_image(row[image_column]).size
        try:
            found = read_image(row[reference_column]).size
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise ValueError(f"{where}: expected an image, found: {one_line(error)}.") from error
        if found != size:
            expected, found = (" x ".join(map(str, each)) for each in (size, found))
            raise ValueError(f"{where}: expected {expected} pixels like the image, found {found}: resize one of them.")


def score_gradient(
    evaluator: Evaluator, images: torch.Tensor, prompts: list[str] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (B,) of `images` (B, 3, H, W) in [0, 1], and their gradients (B, 3, H, W): 0 for a score that ignores them."""
    with torch.enable_grad():
        inputs = images.detach().requires_grad_(True)
        scores = evaluator.score(inputs, prompts)
        gradient = None
        if scores.requires_grad:
            (gradient,) = torch.autograd.grad(scores.sum(), inputs, allow_unused=True)
    return scores.detach(), torch.zeros_like(images) if gradient is None else gradient


def low_pass(images: torch.Tensor) -> torch.Tensor:
    """The mean of 3 x 3 pixels, (B, C, H, W) -> (B, C, H, W); at the border, of those that there are."""
    return F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of the angle between two tensors of one shape, in [-1, 1]; nan where one of them is 0."""
    first, second = first.double().flatten(), second.double().flatten()
    norm = (first.norm() * second.norm()).item()
    return torch.dot(first, second).item() / norm if norm else math.nan


def direction(gradient: torch.Tensor, way: torch.Tensor) -> dict[str, float]:
    """`cosine` of a score's `gradient` (1, 3, H, W) with the `way` to the original (1, 3, H, W), by `FREQUENCIES`:
    of both as they are, of both after `low_pass`, and of what that takes away."""
    low_gradient, low_way = low_pass(gradient), low_pass(way)
    return {
        "all": cosine(gradient, way),
        "low": cosine(low_gradient, low_way),
        "high": cosine(gradient - low_gradient, way - low_way),
    }


def measure_robustness(
    evaluator: Evaluator,
    rows: datasets.Dataset,
    image_column: str = "image",
    mos_column: str = "mos",
    prompt_column: str | None = None,
    reference_column: str = "reference",
    device: str | torch.device = "cpu",
) -> dict[str, dict]:
    """`robustness` and `direction` of `evaluator` on `rows`; what is not defined is None.

    The attack is one signed step along the gradient of the score at the image, the same size in every pixel and colour.

    Args:
        rows: n >= 2, with undecoded images, which are scored one at a time. reference_column: the image's original, an
            undecoded image of the same size, or None; may be missing.
    Returns:
        robustness: `count`; `srcc`, of the scores as they are with the ratings; `steps`, for 1, 2 and 4 of 255:
            `raised` and `lowered`, the mean change of the score in (0, 1) by a step up and by one down, and `srcc` when
            the images rated above the mean are lowered and the others raised, as an adversary would who knows the
            ratings.
        direction: `gradient_l1`, the mean L1 norm of the score's gradient (divided by 255 it is what a step of 1 of 255
            would change if the score were linear; Liu et al., CVPR 2024); `count`, of the rows with an original that
            differs; `all`, `low` and `high`, the mean cosine of the gradient with the way there, see `direction`.
    """
    mos = np.asarray(rows[mos_column][:], dtype=np.float64)
    scores, norms, cosines, ways = [], [], [], 0
    up, down = {e: [] for e in EPSILONS}, {e: [] for e in EPSILONS}
    for row in tqdm(rows, desc="robustness", leave=False):
        image = _to_images(row[image_column], device)  # (1, 3, H, W)
        prompts = None if prompt_column is None else [row[prompt_column]]
        score, gradient = score_gradient(evaluator, image, prompts)
        scores.append(score.item())
        norms.append(gradient.abs().sum().item())
        with torch.no_grad():
            for epsilon in EPSILONS:
                up[epsilon].append(evaluator.score(signed_step(image, gradient, epsilon), prompts).item())
                down[epsilon].append(evaluator.score(signed_step(image, gradient, -epsilon), prompts).item())
        if row.get(reference_column) is not None:
            way = _to_images(row[reference_column], device) - image
            if way.any():
                ways += 1
                cosines.append(direction(gradient, way))
    scores = np.asarray(scores)
    steps = {}
    for epsilon in EPSILONS:
        raised, lowered = np.asarray(up[epsilon]), np.asarray(down[epsilon])
        attacked = np.where(mos > mos.mean(), lowered, raised)
        steps[str(epsilon)] = {
            "srcc": _defined(correlation(attacked, mos)["srcc"]),
            "raised": float((raised - scores).mean()),
            "lowered": float((lowered - scores).mean()),
        }
    return {
        "robustness": {"count": len(mos), "srcc": _defined(correlation(scores, mos)["srcc"]), "steps": steps},
        "direction": {"gradient_l1": float(np.mean(norms)), "count": ways}
        | {name: _mean([each[name] for each in cosines]) for name in FREQUENCIES},
    }


def _to_images(cell: dict, device: str | torch.device) -> torch.Tensor:
    return (pil_to_tensor(read_image(cell)).unsqueeze(0) / 255).to(device)


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: Sequence[float]) -> float | None:
    """Over the values that are defined."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else None


def robustness_tables(parts: dict[str, dict]) -> str:
    """Markdown: of each of `parts` (name: a report's) that has been measured the attacks, then the direction."""
    measured = {name: part for name, part in parts.items() if "robustness" in part}
    lines = ["| rows | number | step, of 255 | SRCC | score raised by | lowered by |", "|---|---|---|---|---|---|"]
    for name, part in measured.items():
        found = part["robustness"]
        lines.append(f"| {name} | {found['count']} | none | {_number(found['srcc'])} | | |")
        for epsilon, step in found["steps"].items():
            changes = f"{100 * step['raised']:.1f} % | {-100 * step['lowered']:.1f} %"
            lines.append(f"| {name} | {found['count']} | {epsilon} | {_number(step['srcc'])} | {changes} |")
    lines += ["", "| rows | gradient, L1 norm | originals | cosine | low frequencies | high frequencies |"]
    lines.append("|---|---|---|---|---|---|")
    for name, part in measured.items():
        found = part["direction"]
        cosines = " | ".join(_number(found[frequency], 4) for frequency in FREQUENCIES)
        lines.append(f"| {name} | {found['gradient_l1']:.4g} | {found['count']} | {cosines} |")
    lines += [
        "",
        "One signed step along the score's own gradient; changes are shares of the range of scores; in SRCC the images rated "
        "above the mean are lowered and the others raised. Cosine: of the gradient with the way to the image's original.",
    ]
    if not all(part["direction"]["count"] for part in measured.values()):
        lines[-1] += " Rows without originals (`--reference_column`) have none."
    return "\n".join(lines)


def _number(value: float | None, digits: int = 3) -> str:
    return "not defined" if value is None else f"{value:.{digits}f}"
