r"""Weighted average without the updates whose norm is far above the round's median.

With :math:`\rho_k` the root mean square of client k's differences over the entries that it holds, updates of
:math:`\rho_k > c \operatorname{med}_j \rho_j` are left out. Weights are at most c times the median weight.

Breakdown point: fewer than half of the cohort hostile. A hostile update of ordinary norm passes.
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


@register("aggregator", "norm_filter")
@dataclass(frozen=True)
class NormFilter:
    """Weighted average without the updates whose norm is above a multiple of the round's median.

    Attributes
    ----------
    multiple : float
        Largest norm that counts, as a multiple of the median norm, >= 1.
    """

    multiple: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= self.multiple < float("inf"):
            raise ConfigError(f"aggregator.multiple={self.multiple} is not allowed: it must be at least 1")

    def begin(self, params: Mapping[str, Tensor]) -> Accumulator:
        """Return an accumulator, which holds all updates of the round."""
        return _NormFilter(params, self.multiple)


class _NormFilter(HeldUpdates):
    def __init__(self, params: Mapping[str, Tensor], multiple: float) -> None:
        super().__init__(params)
        self._multiple = multiple

    def prepare(self) -> None:
        """Find the weight of each update: 0 where its norm is too large."""
        norms, weights = self.root_mean_squares(), torch.tensor(self.weights, dtype=torch.float64)
        if len(weights):
            bounded = weights.clamp(max=float(self._multiple * weights.median()))
            self._passed = torch.where(norms <= self._multiple * norms.median(), bounded, 0.0)

    def combine(self, stack: Tensor, center: Tensor) -> Tensor:
        """Return the weighted mean of the updates that pass; the values before the round where none holds an entry."""
        return weighted_mean(stack, self._passed).where(~torch.isnan(stack[self._passed > 0]).all(dim=0), center)
