"""The anchor of ACPO eq. 7: what the frozen base model predicts, from the same weights with the LoRA switched off."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel


# What L_anchor came to in the last third of the demo's run, whose images its judge does not call worse: 0.0066 to 0.0077 over
# three seeds (docs/guard.md).
ANCHOR_BUDGET = 0.007
INTEGRAL, PROPORTIONAL = 0.08, 2.0  # gains on the weight's logarithm, the first one per step
SMOOTHING = 0.8


@contextmanager
def without_adapter(unet: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Inside, the U-Net is the base model: its LoRA is off. It is on again after, also after an error.

    Args:
        unet: a diffusers U-Net or transformer with an adapter (`add_adapter`, or peft's `get_peft_model`), as it is or as
            `accelerator.prepare` returned it. One without an adapter is itself the base: the frozen copy of a full
            fine-tuning.
    Yields:
        The U-Net, out of its parallel wrapper.
    """
    from peft import PeftModel

    model = extract_model_from_parallel(unet)
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield model
    elif getattr(model, "_hf_peft_config_loaded", False):
        model.disable_adapters()
        try:
            yield model
        finally:
            model.enable_adapters()
    else:
        yield model


@torch.no_grad()
def base_prediction(
    unet: torch.nn.Module,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    *conditioning: Any,
    predict: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """eps_theta(z_t, t, c): the prediction of the base model, without graph and without a second copy of it (eq. 7).

    Call it before the student's forward pass: its activations are then freed before the student's graph is built. The
    adapter is on again on return: `backward` needs it, gradient checkpointing runs the forward again.

    Args:
        unet: as in `without_adapter`. noisy_latents: (B, C, h, w). timesteps: (B,).
        conditioning: what else the U-Net is called with: encoder_hidden_states (B, tokens, dim), or nothing.
        predict: (model, noisy_latents, timesteps, *conditioning) -> prediction, of models that are called otherwise.
    Returns:
        (B, C, h, w), in the scheduler's prediction type.
    """
    with without_adapter(unet) as model:
        if predict is not None:
            return predict(model, noisy_latents, timesteps, *conditioning)
        return model(noisy_latents, timesteps, *conditioning, return_dict=False)[0]


class AnchorBudget:
    """Holds the mean of L_anchor (eq. 7) at `budget` by a controlled weight of the anchor; without one the weight stays.

    Training under the constraint E[L_anchor] <= budget has lambda_anchor of eq. 9 as its multiplier. Dual ascent adds up how
    far the constraint is broken: multiplier <- multiplier exp(INTEGRAL e), e = clamp(log(mean / budget), -0.5, 1), where the
    mean is exponential, as one batch says little. Alone it swings: Adam moves a LoRA at the same pace however strong the
    anchor is, so that the multiplier goes on rising until the drift is taken back. What damps it is a term in e itself,
    lambda_anchor = multiplier exp(PROPORTIONAL e) (PID Lagrangian, Stooke et al., 2020). Logarithms, since weights of any
    size may be right and none below 0 is.

    Args:
        budget: of L_anchor, in squared units of the prediction, above 0, or None. weight: lambda_anchor at the start,
            with a budget above 0.
    """

    def __init__(self, budget: float | None, weight: float):
        if budget is not None and not (budget > 0 and weight > 0):
            raise ValueError(f"expected an anchor budget and weight above 0, found {budget:g} and {weight:g}")
        self.budget, self.multiplier, self.weight = budget, weight, weight
        self.total, self.count = 0.0, 0.0

    def update(self, loss_anchor: float | None) -> float:
        """The weight of the next step, after one of which the anchor loss, a mean over all processes, was this."""
        if self.budget is None or loss_anchor is None or not math.isfinite(loss_anchor):  # then the step is skipped
            return self.weight
        self.total = SMOOTHING * self.total + loss_anchor
        self.count = SMOOTHING * self.count + 1
        mean = max(self.total / self.count, 1e-9 * self.budget)
        error = max(-0.5, min(1.0, math.log(mean / self.budget)))
        self.multiplier *= math.exp(INTEGRAL * error)
        self.weight = self.multiplier * math.exp(PROPORTIONAL * error)
        return self.weight

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("multiplier", "weight", "total", "count")}

    def load_state_dict(self, state: dict) -> None:
        self.multiplier, self.weight = state["multiplier"], state["weight"]
        self.total, self.count = state["total"], state["count"]
