r"""Coordinate-wise trimmed mean over the clients that returned an entry (Yin et al., ICML 2018).

Of the :math:`m` values of an entry the :math:`\lfloor \beta m \rfloor` smallest and as many largest are left out; the
mean of the rest is the new value.

Breakdown point: at most :math:`\beta m` hostile holders of an entry, and fewer than half; the value then lies between
values of honest clients.

Deviations
----------
Coverage is unequal here: m is the number of clients that returned the entry, not the cohort. Clients count alike;
weights are not used, since a hostile client would choose its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.errors import ConfigError
from fedlp.federation.aggregation.aggregator import Accumulator
from fedlp.federation.aggregation.held_updates import HeldUpdates
from fedlp.registry import register


@register("aggregator", "trimmed_mean")
@dataclass(frozen=True)
class TrimmedMean:
    """Coordinate-wise trimmed mean over the clients that returned an entry; clients count alike.

    Attributes
    ----------
    fraction : float
        Fraction of the values of an entry left out at either end, in [0, 0.5).
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 0.5:
            raise ConfigError(f"aggregator.fraction={self.fraction} is not allowed: it must be in [0, 0.5)")

    def begin(self, params: Mapping[str, Tensor]) -> Accumulator:
        """Return an accumulator, which holds all updates of the round."""
        return _TrimmedMean(params, self.fraction)


class _TrimmedMean(HeldUpdates):
    def __init__(self, params: Mapping[str, Tensor], fraction: float) -> None:
        super().__init__(params)
        self._fraction = fraction

    def combine(self, stack: Tensor, center: Tensor) -> Tensor:
        """Return the mean of each column's values without the trimmed ones."""
        count = (~torch.isnan(stack)).sum(dim=0)
        ordered = stack.sort(dim=0).values  # NaN last
        cut = (self._fraction * count.to(torch.float64) + 1e-9).floor().to(torch.int64)  # plus what rounding takes off
        place = torch.arange(len(stack))[:, None]
        inside = (place >= cut) & (place < count - cut)
        return torch.where(inside, ordered, 0.0).sum(dim=0) / inside.sum(dim=0).to(torch.float64)
