r"""Centred clipping over the clients that returned an entry (Karimireddy et al., ICML 2021).

From :math:`v = x`, the values before the round, a few steps of

.. math:: v \leftarrow v + \frac{1}{m} \sum_k (x_k - v) \min\left(1, \frac{\tau}{\rho_k(v)}\right),

with :math:`\rho_k(v)` the root mean square of :math:`x_k - v` over the entries that client k holds, and :math:`\tau` a
multiple of the round's median :math:`\rho_k(x)`.

Breakdown point: fewer than half of the cohort hostile; each hostile client moves a step by at most :math:`\tau / m`.

Deviations
----------
The center is the global model, not a momentum of clients. :math:`\tau` is relative. The mean is over the clients that
hold an entry.
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


@register("aggregator", "centred_clipping")
@dataclass(frozen=True)
class CentredClipping:
    """Clipped steps from the global model towards the updates; clients count alike.

    Attributes
    ----------
    multiple : float
        Clipping radius as a multiple of the round's median norm, > 0.
    steps : int
        Steps, >= 1.
    """

    multiple: float = 1.0
    steps: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.multiple < float("inf"):
            raise ConfigError(f"aggregator.multiple={self.multiple} is not allowed: it must be above 0")
        if self.steps < 1:
            raise ConfigError(f"aggregator.steps={self.steps} is not allowed: it must be at least 1")

    def begin(self, params: Mapping[str, Tensor]) -> Accumulator:
        """Return an accumulator, which holds all updates of the round."""
        return _CentredClipping(params, self.multiple, self.steps)


class _CentredClipping(HeldUpdates):
    def __init__(self, params: Mapping[str, Tensor], multiple: float, steps: int) -> None:
        super().__init__(params)
        self._multiple, self._steps = multiple, steps
        self._scales: list[Tensor] = []

    def prepare(self) -> None:
        """Find the clipping scale of each update at each step."""
        norms = self.root_mean_squares()
        if not len(norms):
            return
        radius = self._multiple * norms.median()
        tiny = torch.finfo(torch.float64).tiny
        for _ in range(self._steps):
            self._scales.append((radius / norms.clamp(min=tiny)).clamp(max=1.0))
            total, count = torch.zeros_like(norms), torch.zeros_like(norms)
            for name in self.float_names():
                stack, center = self.stack(name), self.params[name].flatten().to(torch.float64)
                left = stack - self.combine(stack, center)
                total += left.square().nansum(dim=1)
                count += (~torch.isnan(left)).sum(dim=1)
            norms = (total / count.clamp(min=1.0)).sqrt()

    def combine(self, stack: Tensor, center: Tensor) -> Tensor:
        """Return the values after all steps so far."""
        equal = torch.ones(len(stack), dtype=torch.float64)
        value = center
        for scales in self._scales:
            value = value + weighted_mean((stack - value) * scales[:, None], equal).nan_to_num()
        return value
