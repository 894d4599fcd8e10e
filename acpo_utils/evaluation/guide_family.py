"""Which metrics look through a network of the guide's kind: what deceives the guide may deceive them, too."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from acpo_utils.evaluators.loading import CLIP_METRIC_NAMES, SAVED


# Patterns of network names, as timm and the packages have them.
FAMILIES = {
    "EfficientNet": r"efficientnet|mobilenet",
    "ConvNeXt": r"convnext",
    "VGG": r"vgg",
    "AlexNet": r"alex",
    "Inception": r"inception",
    "ResNet": r"resnet|hyperiqa",
    "ViT": r"vit|clip|pickscore|maniqa",
}
# The networks of the metrics that are named without them.
LOOKS_THROUGH = {"judge": "efficientnet", "kid": "inception", "fid": "inception", "is": "inception"}
LOOKS_THROUGH |= {"lpips-diversity": "alex", "kid:lite2": "efficientnet"}
FAMILY_MARK = "(guide's family)"
FAMILY_NOTE = (
    "guide's family: it looks through a network of the guide's kind ({}), and may be deceived as the guide is."
)


def family(metric) -> str | None:
    """The kind of network that `metric` looks through, one of `FAMILIES`; None if it has none or it is not known.

    Args:
        metric: a name of `--metrics` or `--evaluator`, or a loaded evaluator or judge.
    """
    if not isinstance(metric, str):
        config = getattr(metric, "config", None)
        if isinstance(config, Mapping):
            return _of_config(config)
        return _named(" ".join(type(part).__name__ for part in (metric, getattr(metric, "network", None))))
    kind, _, rest = metric.partition(":")
    if metric in LOOKS_THROUGH or kind == "judge":
        return _named(LOOKS_THROUGH.get(metric, LOOKS_THROUGH["judge"]))
    if kind in SAVED or Path(metric).is_dir():
        file = Path(rest if kind in SAVED else metric, "config.json")
        try:
            return _of_config(json.loads(file.read_text()))
        except (OSError, ValueError):  # on the hub, or trained elsewhere
            return None
    return None if kind == "python" else _named(kind if kind in CLIP_METRIC_NAMES else rest or kind)


def shared_family(metric, guides: Iterable) -> str | None:
    """The family of `metric` if one of `guides` is of it too; each as `family` takes it."""
    found = family(metric)
    return found if found and found in {family(guide) for guide in guides} else None


def family_note(families: Iterable[str | None]) -> list[str]:
    """What stands below a table with such metrics; `families` as `shared_family` found them."""
    found = sorted({name for name in families if name})
    return [FAMILY_NOTE.format(", ".join(found))] if found else []


def _of_config(config: Mapping) -> str | None:
    """Of an IPCE's configuration. The two-stream network is of no family."""
    vision = (config.get("clip_config") or {}).get("vision_cfg")
    if vision is None:
        return None
    if vision.get("timm_model_name"):
        return _named(vision["timm_model_name"])
    return "ResNet" if isinstance(vision.get("layers"), list) else "ViT"  # open_clip's own towers


def _named(name: str) -> str | None:
    return next((known for known, pattern in FAMILIES.items() if re.search(pattern, name, re.IGNORECASE)), None)
