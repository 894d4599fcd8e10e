"""The no-reference metrics of pyiqa as evaluators."""

import logging
from typing import TYPE_CHECKING

import torch

from acpo_utils.evaluators.score_scale import to_unit_interval
from acpo_utils.files import no_pickles, one_line


if TYPE_CHECKING:
    from pyiqa.models.inference_model import InferenceModel


logger = logging.getLogger(__name__)
PYIQA_REMOTE_CODE = ("qalign", "compare2score")  # names begin so; pyiqa runs their repositories' code
PYIQA_LICENCE = (
    "pyiqa is under the PolyForm Noncommercial licence 1.0.0 and its weights are CC-BY-NC-SA-4.0: a model guided by "
    "it is for noncommercial use, unless you have another licence from its authors."
)


class PyIQAMetric(torch.nn.Module):
    """A no-reference metric of pyiqa, frozen, with gradient to the image.

    Native scores are mapped by `to_unit_interval` and pyiqa's own `score_range`; where lower is better, they are
    turned over first, and reported with a minus sign: in a report higher is better, as everywhere else.
    """

    def __init__(self, metric: "InferenceModel", name: str):
        super().__init__()
        low, high = parse_score_range(metric.score_range, name)
        self.metric, self.sign = metric, -1.0 if metric.lower_better else 1.0
        self.score_range = (-high, -low) if metric.lower_better else (low, high)
        self.eval().requires_grad_(False)

    def score(self, images: torch.Tensor, prompts: list[str] | None = None) -> torch.Tensor:
        """Scores (B,) in (0, 1) of `images` (B, 3, H, W) in [0, 1]; `prompts` are ignored. In fp32."""
        with torch.autocast(images.device.type, enabled=False):
            native = self.metric(images.float()).float()  # (B,), (B, 1) or, from some metrics, a number for B = 1
        return to_unit_interval(self.sign * native.reshape(-1), *self.score_range)


def parse_score_range(text: str | None, name: str) -> tuple[float, float]:
    """pyiqa's "~0, ~100" (roughly 0 to 100) as numbers. Raises ValueError if an end is open, as in "0, ~"."""
    try:
        low, high = (float(part.replace("~", "")) for part in str(text).split(","))
        if low >= high:
            raise ValueError
    except ValueError:
        raise ValueError(
            f'Evaluator "pyiqa:{name}": expected a metric with a bounded range, found {text!r}. Write a callable with '
            'a mapping of your own to (0, 1) and name it "python:MODULE:NAME".'
        ) from None
    return low, high


def load_pyiqa_metric(name: str, device: str | torch.device | None = None) -> PyIQAMetric:
    """The no-reference metric `name` of pyiqa (`pip install pyiqa`), e.g. musiq, maniqa, clipiqa, liqe, topiq_nr.

    Logs pyiqa's licence as a warning. pyiqa downloads its weights itself, most of them as pickles, of which nothing but
    tensors is read here; metrics on OpenAI's CLIP load its TorchScript archive.

    Raises:
        ImportError: if pyiqa is not installed.
        ValueError: in one line, for an unknown metric, one that compares with a reference image, one without bounded
            range, one that would run code from a hub, or weights that cannot be loaded. That a metric has a gradient
            is `check_evaluator`'s to find out.
    """
    try:
        import pyiqa
        from pyiqa.default_model_configs import DEFAULT_CONFIGS
    except ImportError as error:
        raise ImportError(f'Evaluator "pyiqa:{name}" needs the package pyiqa: pip install pyiqa ({error})') from error
    logger.warning(PYIQA_LICENCE)
    # Before the metric is made: some run code from a hub when they are.
    if name == "clipscore":
        raise ValueError('Evaluator "pyiqa:clipscore" is given no prompts: name "clipscore" instead.')
    if name.startswith(PYIQA_REMOTE_CODE):
        raise ValueError(
            f'Evaluator "pyiqa:{name}": expected a metric of pyiqa\'s own, this one runs code from a hub.'
        )
    if DEFAULT_CONFIGS.get(name, {}).get("metric_mode") != "NR":
        raise ValueError(
            f'Evaluator "pyiqa:{name}": expected a no-reference metric, one of pyiqa.list_models("NR"), found no '
            "such name there."
        )
    parse_score_range(DEFAULT_CONFIGS[name].get("score_range"), name)
    try:
        with no_pickles():
            device = torch.device(device or "cpu")
            metric = pyiqa.create_metric(name, as_loss=True, loss_reduction="none", device=device)
    except Exception as error:  # of many kinds: network, unpickling, optional packages of single metrics
        reason = one_line(error)
        raise ValueError(f'Evaluator "pyiqa:{name}": pyiqa cannot load it: {reason}') from error
    return PyIQAMetric(metric, name)
