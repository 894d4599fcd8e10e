"""From a metric's published scale to scores in (0, 1)."""

import logging

import torch


logger = logging.getLogger(__name__)
MARGIN = 0.05


def to_unit_interval(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """`values` of any shape to (0, 1): `low` and `high` become 0 and 1, and the ends bend instead of being cut.

    Between 5 % and 95 % of the range it is (value - low) / (high - low) exactly. Beyond, the distance to 0 or to 1
    falls as a hyperbola that continues value and slope, m^2 / (2 m - x) with m = 0.05: the gradient gets smaller and is
    nowhere zero, so that even a score outside its metric's documented range can be improved.
    """
    x = (values - low) / (high - low)
    # Each denominator is at least m where its branch is taken, and kept there elsewhere: no inf reaches the gradient.
    below = MARGIN**2 / (2 * MARGIN - x.clamp(max=MARGIN))
    above = 1 - MARGIN**2 / (x.clamp(min=1 - MARGIN) - 1 + 2 * MARGIN)
    return torch.where(x < MARGIN, below, torch.where(x > 1 - MARGIN, above, x))
