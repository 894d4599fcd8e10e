"""How strong the anchor has to be, found while training: its weight as the multiplier of a limit on L_anchor."""

import math


# What L_anchor came to in the last third of the demo's run, whose images its judge does not call worse: 0.0066 to 0.0077 over
# three seeds (docs/guard.md).
ANCHOR_BUDGET = 0.007
RATE = 0.05  # of the weight's logarithm, per step
SMOOTHING = 0.9


class AnchorBudget:
    """Holds the mean of L_anchor (eq. 7) at `budget` by dual ascent on the anchor's weight.

    Training under the constraint E[L_anchor] <= budget has lambda_anchor of eq. 9 as its multiplier. It goes up while the
    constraint is broken and down while there is room: lambda <- lambda exp(RATE clamp(mean / budget - 1, -1, 1)), where
    the mean is exponential, as one batch says little. The step is on the logarithm, since weights of any size may be
    right and none below 0 is.

    Args:
        budget: of L_anchor, in squared units of the prediction, above 0. weight: lambda_anchor at the start, above 0.
    """

    def __init__(self, budget: float, weight: float):
        if not budget > 0 or not weight > 0:
            raise ValueError(f"expected an anchor budget and weight above 0, found {budget:g} and {weight:g}")
        self.budget, self.weight = budget, weight
        self.total, self.count = 0.0, 0.0

    def update(self, loss_anchor: float) -> float:
        """The weight of the next step, after one of which the anchor loss, a mean over all processes, was this."""
        if not math.isfinite(loss_anchor):  # the step is skipped
            return self.weight
        self.total = SMOOTHING * self.total + loss_anchor
        self.count = SMOOTHING * self.count + 1
        excess = self.total / self.count / self.budget - 1
        self.weight *= math.exp(RATE * max(-1.0, min(1.0, excess)))
        return self.weight

    def state_dict(self) -> dict:
        return {"weight": self.weight, "total": self.total, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.weight, self.total, self.count = state["weight"], state["total"], state["count"]
