"""Coordinate-wise median over the clients that returned an entry (Yin et al., ICML 2018).

Breakdown point: fewer than half of the holders of an entry hostile; the value then lies between values of honest
clients. An entry with one or two holders has no protection. Of an even number of values the mean of the middle two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.federation.aggregation.aggregator import Accumulator
from fedlp.federation.aggregation.held_updates import HeldUpdates
from fedlp.registry import register


@register("aggregator", "median")
@dataclass(frozen=True)
class Median:
    """Coordinate-wise median over the clients that returned an entry; clients count alike."""

    def begin(self, params: Mapping[str, Tensor]) -> Accumulator:
        """Return an accumulator, which holds all updates of the round."""
        return _Median(params)


class _Median(HeldUpdates):
    def combine(self, stack: Tensor, center: Tensor) -> Tensor:
        """Return the median of each column's values."""
        count = (~torch.isnan(stack)).sum(dim=0)
        ordered = stack.sort(dim=0).values  # NaN last
        low, high = ((count - 1).clamp(min=0) // 2)[None], (count // 2).clamp(max=len(stack) - 1)[None]
        return (0.5 * (ordered.gather(0, low) + ordered.gather(0, high)))[0]
