r"""Coordinate-wise trimmed mean over the clients that returned an entry (Yin et al., ICML 2018).

Of the :math:`m` values of an entry the :math:`\lfloor \beta m \rfloor` smallest and as many largest are left out; the
mean of the rest is the new value. With fewer than half of the holders of an entry hostile, and no more than
:math:`\beta m` of them, the value lies between values of honest clients.

Deviations
----------
Coverage is unequal here: m is the number of clients that returned the entry, not the cohort. Clients count alike;
weights are not used, since a hostile client would choose its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlp.errors import ConfigError
from fedlp.federation.aggregation.aggregator import Accumulator
from fedlp.federation.aggregation.coverage import Keeps
from fedlp.registry import register

_BLOCK = 1 << 22  # values that are sorted at a time


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


class _TrimmedMean:
    def __init__(self, params: Mapping[str, Tensor], fraction: float) -> None:
        self._params, self._fraction = params, fraction
        self._updates: dict[str, list[tuple[Tensor, Keeps | None]]] = {name: [] for name in params}

    def add(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weight: float) -> None:
        """Hold an update until the round's end."""
        for name, values in params.items():
            self._updates[name].append((values, keeps.get(name)))

    def result(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the trimmed means, and the fraction of each tensor that somebody returned."""
        found, coverage = {}, {}
        for name, old in self._params.items():
            stack = self._stack(name)
            held = ~torch.isnan(stack)
            covered = held.any(dim=0)
            coverage[name] = float(covered.to(torch.float64).mean()) if old.numel() else 0.0
            columns = max(1, _BLOCK // max(len(stack), 1))
            mean = torch.cat([self._trim(part) for part in torch.split(stack, columns, dim=1)])
            if not old.is_floating_point():
                mean = mean.round()
            new = torch.where(covered, mean.nan_to_num(), old.flatten().to(torch.float64))
            found[name] = torch.where(covered, new.to(old.dtype), old.flatten()).view(old.shape)
        return found, coverage

    def covered(self, name: str) -> bool | Tensor:
        """Return which entries of a tensor somebody returned."""
        updates = self._updates[name]
        if not updates or any(keeps is None for _, keeps in updates):
            return bool(updates)
        return (~torch.isnan(self._stack(name))).any(dim=0).view(self._params[name].shape)

    def _stack(self, name: str) -> Tensor:
        """Return the values of all updates, (updates, entries), float64; NaN where an update has none."""
        shape, updates = self._params[name].shape, self._updates[name]
        stack = torch.full((len(updates), self._params[name].numel()), torch.nan, dtype=torch.float64)
        for row, (values, keeps) in zip(stack, updates, strict=True):
            if keeps is None:
                row.copy_(values.flatten())
            else:
                index = np.ix_(*(keep.indices() for keep in keeps))
                row.view(shape)[tuple(map(torch.from_numpy, index))] = values.to(torch.float64)
        return stack

    def _trim(self, stack: Tensor) -> Tensor:
        """Return the mean of each column's values but for the trimmed ones; NaN where there are none."""
        count = (~torch.isnan(stack)).sum(dim=0)
        ordered = stack.sort(dim=0).values  # NaN last
        cut = (self._fraction * count.to(torch.float64) + 1e-9).floor().to(torch.int64)  # plus what rounding takes off
        place = torch.arange(len(stack))[:, None]
        inside = (place >= cut) & (place < count - cut)
        total = torch.where(inside, ordered, 0.0).sum(dim=0)
        return total / inside.sum(dim=0).to(torch.float64)
