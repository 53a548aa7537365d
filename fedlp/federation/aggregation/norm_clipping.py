r"""Weighted average of updates whose norms and weights are bounded by the round's medians.

With :math:`\rho_k` the root mean square of client k's differences over the entries that it holds, its differences are
scaled by :math:`\min(1, c \operatorname{med}_j \rho_j / \rho_k)`, and its weight is at most c times the median weight.

Breakdown point: with fewer than half of the cohort hostile, each hostile client moves the average by at most c times
an honest client's step, times c of an honest weight. It bounds harm, and does not remove it.

The norm is per entry held, since a client of a narrow sub-model holds fewer entries. Bounds do nothing where no
client's norm or weight is above c times the median: the result is then the coverage average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.errors import ConfigError
from fedlp.federation.aggregation.aggregator import Accumulator
from fedlp.federation.aggregation.held_updates import HeldUpdates, weighted_mean
from fedlp.registry import register


@register("aggregator", "norm_clipping")
@dataclass(frozen=True)
class NormClipping:
    """Weighted average of updates whose norms and weights are bounded by multiples of the round's medians.

    Attributes
    ----------
    multiple : float
        Bound as a multiple of the median norm, and of the median weight, >= 1.
    """

    multiple: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= self.multiple < float("inf"):
            raise ConfigError(f"aggregator.multiple={self.multiple} is not allowed: it must be at least 1")

    def begin(self, params: Mapping[str, Tensor]) -> Accumulator:
        """Return an accumulator, which holds all updates of the round."""
        return _NormClipping(params, self.multiple)


class _NormClipping(HeldUpdates):
    def __init__(self, params: Mapping[str, Tensor], multiple: float) -> None:
        super().__init__(params)
        self._multiple = multiple

    def prepare(self) -> None:
        """Find the scale and the weight of each update."""
        norms, weights = self.root_mean_squares(), torch.tensor(self.weights, dtype=torch.float64)
        if len(weights):
            bound = self._multiple * norms.median()
            self._scales = torch.where(norms > bound, bound / norms.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
            self._bounded = weights.clamp(max=float(self._multiple * weights.median()))

    def combine(self, stack: Tensor, center: Tensor) -> Tensor:
        """Return the weighted mean of the scaled differences, added to the values before the round."""
        return center + weighted_mean((stack - center) * self._scales[:, None], self._bounded)
