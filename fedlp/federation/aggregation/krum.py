r"""Krum and multi-Krum over the entries that clients have in common (Blanchard et al., NeurIPS 2017).

The distance of two updates is the mean squared difference over the entries that both hold. With at most f hostile of m
clients, a client's score is the sum of its distances to its :math:`m - f - 2` nearest; the updates of the n lowest
scores are averaged (n = 1: Krum).

Breakdown point: :math:`2 f + 2 < m`. Entries that only clients outside the selection hold keep their values.

Deviations
----------
Coverage is unequal here, so distances are means over common entries; two clients without a common entry are at the
largest distance of the round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.errors import ConfigError
from fedlp.federation.aggregation.aggregator import Accumulator
from fedlp.federation.aggregation.held_updates import HeldUpdates, weighted_mean
from fedlp.registry import register


@register("aggregator", "krum")
@dataclass(frozen=True)
class Krum:
    """Average of the updates that lie closest to the others; clients count alike.

    Attributes
    ----------
    hostile : float
        Fraction of the cohort that may be hostile, in [0, 0.5).
    selected : float or None
        Fraction of the cohort that is averaged, in (0, 1]; 1 - ``hostile`` if None (multi-Krum). A fraction that
        comes to one client is Krum.
    """

    hostile: float = 0.2
    selected: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.hostile < 0.5:
            raise ConfigError(f"aggregator.hostile={self.hostile} is not allowed: it must be in [0, 0.5)")
        if self.selected is not None and not 0 < self.selected <= 1:
            raise ConfigError(f"aggregator.selected={self.selected} is not allowed: it must be in (0, 1], or null")

    def begin(self, params: Mapping[str, Tensor]) -> Accumulator:
        """Return an accumulator, which holds all updates of the round."""
        return _Krum(params, self.hostile, 1.0 - self.hostile if self.selected is None else self.selected)


class _Krum(HeldUpdates):
    def __init__(self, params: Mapping[str, Tensor], hostile: float, selected: float) -> None:
        super().__init__(params)
        self._hostile, self._fraction = hostile, selected
        self._chosen = torch.zeros(0)

    def prepare(self) -> None:
        """Select the updates that lie closest to the others."""
        count = len(self.weights)
        if not count:
            return
        near = max(1, count - math.ceil(self._hostile * count) - 2)
        scores = self._distances().sort(dim=1).values[:, 1 : near + 1].sum(dim=1)
        keep = torch.sort(scores, stable=True).indices[: max(1, math.floor(self._fraction * count))]
        self._chosen = torch.zeros(count, dtype=torch.float64)
        self._chosen[keep] = 1.0

    def combine(self, stack: Tensor, center: Tensor) -> Tensor:
        """Return the mean of the selected updates; the values before the round where none of them holds an entry."""
        return weighted_mean(stack, self._chosen).where(~torch.isnan(stack[self._chosen > 0]).all(dim=0), center)

    def _distances(self) -> Tensor:
        """Return the mean squared difference of each pair over common entries, (updates, updates)."""
        count = len(self.weights)
        total = torch.zeros(count, count, dtype=torch.float64)
        common = torch.zeros(count, count, dtype=torch.float64)
        for name in self.float_names():
            differences = self.differences(name)
            held = (~torch.isnan(differences)).to(torch.float64)
            values = differences.nan_to_num()
            squares = values.square() @ held.T
            total += squares + squares.T - 2.0 * values @ values.T
            common += held @ held.T
        distances = total.clamp(min=0.0) / common.clamp(min=1.0)
        distances[common == 0] = distances.max()
        distances.fill_diagonal_(0.0)
        return distances
