"""A panel in place of a judge: base and fine-tuned images beside real ones, through several networks and through none.

One network can be deceived as the guide was, and each sees some scales and not others. So a gain counts if measures that
have nothing in common agree on it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from acpo_utils.evaluation import real_pairs
from acpo_utils.evaluation.guide_family import shared_family
from acpo_utils.evaluation.image_batches import Images
from acpo_utils.evaluation.networks import NETWORKS, load_network, look, standardised
from acpo_utils.evaluation.set_metrics import kid_draws, mean_kernel
from acpo_utils.evaluation.sliced_wasserstein import SlicedWasserstein
from acpo_utils.evaluation.table import paired_row, panel_table, set_row
from acpo_utils.files import one_line
from acpo_utils.statistics import bootstrap_change, bootstrap_weights


# By name. "kid" is Inception's, whose weights are downloaded, and is not measured unless it is named.
KID = {"kid": "inception"} | {f"kid:{network}": network for network in NETWORKS}
ST_LPIPS = {f"st-lpips:{network}": network for network in NETWORKS if network != "lite2"}
DISTORTION = {"ssim": real_pairs.ssim, "pixel-mse": real_pairs.pixel_mse}
STATISTICS = {"edge-energy": real_pairs.edge_energy, "saturation": real_pairs.saturation}
PAIRED = (*ST_LPIPS, *DISTORTION)
MEMBERS = (*KID, "swd", *PAIRED, *STATISTICS)
PANEL = tuple(name for name in MEMBERS if name != "kid")  # what the name "panel" stands for
WITHOUT_PAIRS = tuple(name for name in PANEL if name not in PAIRED)  # of images that no prompt describes
BESIDE_REAL = (*KID, "swd", *PAIRED)  # what cannot be measured without real images
DRAWS = 200  # of the bootstrap


# What is said where there is no panel.
NO_REAL = (
    "Without real images of the prompts there is no panel (KID, SWD, distances to the real images): prompts from a parquet "
    "file with a column `image` bring them."
)


class PanelRows(NamedTuple):
    """{label: {model: numbers}}, and {name: reason} of what cannot be had."""

    rows: dict[str, dict]
    unavailable: dict[str, str]


def measure_panel(
    names: Sequence[str],
    images: dict[str, Images],
    real: Images | None,
    pairs: Sequence[tuple[int, int]],
    device: str | torch.device,
    seed: int = 0,
) -> PanelRows:
    """Those of `MEMBERS` that are named, of every model against "base".

    Args:
        images: N of "base" and of each other model, of the same prompts and noise. real: R images of the same size, or None.
        pairs: (row of the images, row of the real image of the same caption), each row of the images at most once.
        seed: of the bootstrap's draws.
    Returns:
        Numbers as `acpo_utils.evaluation.table` takes them, with `lower_is_better`; where the real images' own value is
        best, it is in `real_mean`. What raises ValueError, ImportError, OSError or RuntimeError is unavailable, and the rest
        goes on: packages, weights, memory, images of several sizes.
    """
    panel = PanelRows({}, {})
    wanted = [name for name in MEMBERS if name in names]
    for name in wanted:
        if name in BESIDE_REAL and (real is None or len(real) < 2):
            panel.unavailable[name] = "it needs real images"
        elif name in PAIRED and len(pairs) < 2:
            panel.unavailable[name] = "it needs prompts that are captions of real images"
    wanted = [name for name in wanted if name not in panel.unavailable]
    weights = bootstrap_weights(len(images["base"]), DRAWS, seed)

    groups = {network: [] for network in ("inception", *NETWORKS)}  # names that are measured in one pass
    for name in wanted:
        groups.setdefault((KID | ST_LPIPS).get(name, name), []).append(name)
    for group, members in groups.items():
        try:
            if group in STATISTICS:
                panel.rows[group] = _statistic_rows(STATISTICS[group], images, real, weights)
            elif group in DISTORTION:
                values = {
                    m: real_pairs.pair_values(DISTORTION[group], part, real, pairs) for m, part in images.items()
                }
                panel.rows[group] = _paired_rows(values, group != "ssim", seed)
            elif group == "swd":
                panel.rows.update(_rows_by_scale(images, real, weights))
            elif members:
                panel.rows.update(_rows_through(group, members, images, real, pairs, weights, device, seed))
        except (ValueError, ImportError, OSError, RuntimeError) as error:
            panel.unavailable.update(dict.fromkeys(members, one_line(error)))
    return panel


def measure_panel_of_sets(
    names: Sequence[str],
    images: dict[str, Sequence[Path]],
    sets: dict[str, Sequence[int]],
    real: Sequence[Path] | None,
    pairs: dict[int, int],
    device: str | torch.device,
    seed: int = 0,
) -> PanelRows:
    """`measure_panel` of each set of prompts: {label: {(model, set): numbers}}, and {"name, set": reason}.

    Args:
        images: files of "base" and of each other model. sets: {set: rows of the files}. pairs: {row: row of its real image}.
    """
    panel = PanelRows({}, {})
    for prompt_set, rows in sets.items():
        own_images = {model: [files[row] for row in rows] for model, files in images.items()}
        own_pairs = [(number, pairs[row]) for number, row in enumerate(rows) if row in pairs]
        found = measure_panel(names, own_images, real, own_pairs, device, seed)
        for label, of_models in found.rows.items():
            panel.rows.setdefault(label, {}).update({(model, prompt_set): row for model, row in of_models.items()})
        panel.unavailable.update({f"{name}, {prompt_set}": reason for name, reason in found.unavailable.items()})
    return panel


def _rows_through(network, names, images, real, pairs, weights, device, seed) -> dict[str, dict]:
    """KID and the distances of the pairs through one network."""
    distances = any(name in ST_LPIPS for name in names)
    seen = look(load_network(network, device), images, real, pairs if distances else [], device)
    rows = {}
    for name in names:
        if name in ST_LPIPS:
            rows[name] = _paired_rows(seen.distances, True, seed)
            continue
        features = [seen.real_features, *seen.features.values()]
        if network != "inception":  # whose own are published
            features = standardised(*features)
        kernel = mean_kernel(features[0])
        draws = {model: kid_draws(features[0], own, weights, kernel) for model, own in zip(images, features[1:])}
        rows[name] = _set_rows(draws, len(images["base"]))
    return rows


def _rows_by_scale(images, real, weights) -> dict[str, dict]:
    distance = SlicedWasserstein(real)
    draws = {model: distance.draws(part, weights) for model, part in images.items()}
    n = len(images["base"])
    return {
        band: _set_rows({model: of_model[band] for model, of_model in draws.items()}, n) for band in distance.bands
    }


def _set_rows(draws: dict[str, np.ndarray], n: int) -> dict[str, dict]:
    """Of distances of whole sets: each model's, and its draws of the same weights, (1 + DRAWS,)."""
    base = draws["base"]
    return {
        model: set_row(base[0], own[0], n) | bootstrap_change(base, own) | {"lower_is_better": True}
        for model, own in draws.items()
        if model != "base"
    }


def _paired_rows(values: dict[str, list[float]], lower_is_better: bool, seed: int) -> dict[str, dict]:
    weights = bootstrap_weights(len(values["base"]), DRAWS, seed)
    return {
        model: paired_row(values["base"], own, lower_is_better)
        | bootstrap_change(weights @ values["base"], weights @ own)
        | {"lower_is_better": lower_is_better}
        for model, own in values.items()
        if model != "base"
    }


def _statistic_rows(measure, images, real, weights) -> dict[str, dict]:
    """Of what is best where the real images have it: neither more nor less wins."""
    values = {model: real_pairs.image_values(measure, part) for model, part in images.items()}
    real_mean = None if real is None else float(np.mean(real_pairs.image_values(measure, real)))
    no_winner = dict.fromkeys(("win_rate", "win_rate_low", "win_rate_high", "tie_rate"))
    return {
        model: paired_row(values["base"], own)
        | no_winner
        | bootstrap_change(weights @ values["base"], weights @ own)
        | {"real_mean": real_mean, "lower_is_better": False}
        for model, own in values.items()
        if model != "base"
    }


def panel_report(panel: PanelRows, guides: Sequence) -> tuple[dict[str, dict], list[str]]:
    """Of one model, "finetuned": {label: row} for a json file; and the table as markdown, then a line for each reason why
    something is unavailable.

    guides: the evaluators that trained the model, as `shared_family` takes them.
    """
    rows = {}
    for label, of_models in panel.rows.items():
        own = {"metric": label, "guide": False, "family": shared_family(label, guides)}
        rows[label] = own | of_models["finetuned"]
    lines = [panel_table(rows.values())] if rows else []
    reasons: dict[str, list[str]] = {}
    for name, reason in panel.unavailable.items():
        reasons.setdefault(reason, []).append(name)
    return rows, lines + [f"{', '.join(names)}: unavailable. {reason}" for reason, names in reasons.items()]
