"""The alarm against reward hacking: an obeyed guide goes up; judges that guide nothing say whether the images did."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from acpo_utils.evaluation.grids import comparison_picture
from acpo_utils.evaluation.sampling import score_images
from acpo_utils.families.loading import denoiser
from acpo_utils.lora import load_lora, save_lora
from acpo_utils.statistics import paired_comparison


logger = logging.getLogger(__name__)
ALARM_LEVEL = 0.01  # of both one-sided tests; a training looks many times


def deceived(guide: dict, judges: dict[str, dict]) -> list[str]:
    """The judges whose mean has fallen while the guide's has risen, both by a one-sided paired t-test at ALARM_LEVEL.

    Args:
        guide, judges: what `paired_comparison` returned, base against current.
    """
    if not _confident(guide, 1):
        return []
    return [name for name, comparison in judges.items() if _confident(comparison, -1)]


def _confident(comparison: dict, sign: int) -> bool:
    # p is nan, and the answer no, where all differences are equal, as before the first step.
    return comparison["mean_difference"] * sign > 0 and comparison["p"] / 2 < ALARM_LEVEL


class HackingAlarm:
    """Base and current LoRA on the same held-out prompts and noises, compared by the guide and by judges.

    Without a guide, or with fewer than two prompts, it never rings.

    Args:
        prompts: n strings; a fall that is small beside the spread over prompts takes many of them to be noticed.
        sample: (pipeline, prompts) -> (n, 3, H, W) in [0, 1], from the same noises at every call.
        guide: an evaluator, or None. judges: evaluators that guide nothing, by name, the first one decides what is best.
        device: where the evaluators are.
        output_dir: gets `validation/base-beside-step-N.png` and, if `keep_best`, the LoRA of the best check in `best`.
    """

    def __init__(
        self,
        prompts: list[str],
        sample: Callable,
        guide,
        judges: dict,
        device,
        output_dir: str | Path,
        keep_best: bool = False,
    ):
        self.prompts = prompts
        self.sample = sample
        self.scorers = {"guide": guide} | judges
        self.judges = judges
        self.device = device
        self.output_dir = Path(output_dir)
        self.keep_best = keep_best
        self.enabled = guide is not None and len(prompts) > 1
        self.base = None  # images and scores, of the first check
        self.best_step, self.best_score = 0, None
        self.alarms: dict[int, list[str]] = {}  # step: judges

    def check(self, accelerator, pipeline, step: int) -> bool:
        """Samples, compares, logs, writes the picture; True if the alarm rings. The pipeline's adapter is on after it."""
        if not self.enabled:
            return False
        if self.base is None:
            denoiser(pipeline).disable_adapters()
            self.base = self._images_and_scores(pipeline)
            denoiser(pipeline).enable_adapters()
        base_images, base_scores = self.base
        images, scores = self._images_and_scores(pipeline)
        comparison_picture(
            self.output_dir / "validation" / f"base-beside-step-{step}.png",
            base_images,
            images,
            self.prompts,
            (base_scores["guide"], scores["guide"]),
        )
        rows = {name: paired_comparison(base_scores[name], scores[name]) for name in self.scorers}
        alarmed = deceived(rows["guide"], {name: rows[name] for name in self.judges})
        values = {f"validation/{name} minus base": row["mean_difference"] for name, row in rows.items()}
        accelerator.log(values | {"validation/hacking_alarm": float(bool(alarmed))}, step=step)
        logger.info(
            f"step {step}: " + ", ".join(f"{n} {r['mean_difference']:+.4f} (p {r['p']:.2g})" for n, r in rows.items())
        )
        if alarmed:
            self.alarms[step] = alarmed
            logger.warning(
                f"step {step}: the guide goes up and {', '.join(alarmed)} down (one-sided p below {ALARM_LEVEL}): the "
                "guide is being deceived. Raise --anchor_weight, or lower --quality_weight or --learning_rate."
            )
        elif self.keep_best and self.judges:
            score = scores[next(iter(self.judges))].mean().item()
            if self.best_score is None or score > self.best_score:
                save_lora(denoiser(pipeline), self.output_dir / "best", type(pipeline))
                self.best_step, self.best_score = step, score
        return bool(alarmed)

    def restore_best(self, model: torch.nn.Module, pipeline_class: type | None = None) -> None:
        """If the alarm rang, puts the LoRA of the best check before it into `model`; without one it stays as it is.

        `pipeline_class`: as in `acpo_utils.lora.save_lora`.
        """
        if not (self.keep_best and self.alarms):
            return
        if self.best_step:
            load_lora(model, self.output_dir / "best", pipeline_class=pipeline_class)
            logger.warning(f"The LoRA is that of step {self.best_step}, the best by the judge before the alarm.")
        else:
            logger.warning("No check came before the alarm: the LoRA stays as it is. Lower --validation_steps.")

    def _images_and_scores(self, pipeline) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images = self.sample(pipeline, self.prompts)  # (n, 3, H, W)
        return images, {
            name: score_images(scorer, images, self.prompts, self.device) for name, scorer in self.scorers.items()
        }

    def state_dict(self) -> dict:
        return {
            "prompts": self.prompts,
            "judges": list(self.judges),
            "best_step": self.best_step,
            "best_score": self.best_score,
            "alarms": self.alarms,
        }

    def load_state_dict(self, state: dict) -> None:
        self.alarms = {int(step): judges for step, judges in state["alarms"].items()}
        # With other prompts or judges a score says nothing beside the old one: the best is looked for anew.
        if state["prompts"] == self.prompts and state["judges"] == list(self.judges):
            self.best_step, self.best_score = state["best_step"], state["best_score"]
