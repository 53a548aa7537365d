"""Updates of a round held until its end, for rules that compare clients entry by entry under unequal coverage.

Memory grows with the cohort: each update is held once, and a tensor's values of all clients are stacked in float64 one
tensor at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedlp.federation.aggregation.coverage import Keeps

_BLOCK = 1 << 22  # values that are combined at a time


class HeldUpdates(ABC):
    """Accumulator that holds all updates of a round.

    Parameters
    ----------
    params : mapping from tensor name to Tensor
        Current global values, or zeros if updates are differences. Not modified.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = params
        self.weights: list[float] = []
        self._updates: list[dict[str, tuple[Tensor, Keeps | None]]] = []

    def add(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weight: float) -> None:
        """Hold an update until the round's end."""
        self.weights.append(weight)
        self._updates.append({name: (values, keeps.get(name)) for name, values in params.items()})

    def result(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the combined values, and the fraction of each tensor that the combination covers."""
        self.prepare()
        found, coverage = {}, {}
        for name, old in self.params.items():
            flat = old.flatten()
            covered = self._covered(name)
            coverage[name] = float(covered.to(torch.float64).mean()) if old.numel() else 0.0
            if not bool(covered.any()):
                found[name] = old.clone()
                continue
            stack, center = self.stack(name), flat.to(torch.float64)
            columns = max(1, _BLOCK // max(len(stack), 1))
            parts = zip(torch.split(stack, columns, dim=1), torch.split(center, columns), strict=True)
            values = torch.cat([self.combine(part, middle) for part, middle in parts])
            if not old.is_floating_point():
                values = values.round()
            found[name] = torch.where(covered, values.nan_to_num().to(old.dtype), flat).view(old.shape)
        return found, coverage

    def covered(self, name: str) -> bool | Tensor:
        """Return which entries of a tensor the combination covers."""
        covered = self._covered(name)
        if bool(covered.all()) or not bool(covered.any()):
            return bool(covered.any()) if covered.numel() else False
        return covered.view(self.params[name].shape)

    def prepare(self) -> None:  # noqa: B027 # rules of single entries compare nothing beforehand
        """Compare the clients, after the last update."""

    @abstractmethod
    def combine(self, stack: Tensor, center: Tensor) -> Tensor:
        """Return one value per entry.

        Parameters
        ----------
        stack : (updates, entries) float64
            Values of all updates; NaN where an update has none.
        center : (entries,) float64
            Values before the round.
        """

    def stack(self, name: str) -> Tensor:
        """Return the values of all updates, (updates, entries), float64; NaN where an update has none."""
        shape = self.params[name].shape
        stack = torch.full((len(self._updates), self.params[name].numel()), torch.nan, dtype=torch.float64)
        for row, update in zip(stack, self._updates, strict=True):
            if name not in update:
                continue
            values, keeps = update[name]
            if keeps is None:
                row.copy_(values.flatten())
            else:
                index = np.ix_(*(keep.indices() for keep in keeps))
                row.view(shape)[tuple(map(torch.from_numpy, index))] = values.to(torch.float64)
        return stack

    def differences(self, name: str) -> Tensor:
        """Return each update less the values before the round, (updates, entries); NaN where an update has none."""
        return self.stack(name) - self.params[name].flatten().to(torch.float64)

    def float_names(self) -> list[str]:
        """Return the names of floating-point tensors that some client returned."""
        names = {name for update in self._updates for name in update}
        return [name for name, old in self.params.items() if name in names and old.is_floating_point()]

    def root_mean_squares(self) -> Tensor:
        """Return the root mean square of each update's differences over the entries it holds, (updates,) float64."""
        total, count = torch.zeros(len(self.weights), dtype=torch.float64), torch.zeros(len(self.weights))
        for name in self.float_names():
            differences = self.differences(name)
            total += differences.square().nansum(dim=1)
            count += (~torch.isnan(differences)).sum(dim=1)
        return (total / count.clamp(min=1.0)).sqrt()

    def _covered(self, name: str) -> Tensor:
        if not self._updates:
            return torch.zeros(self.params[name].numel(), dtype=torch.bool)
        return (~torch.isnan(self.stack(name))).any(dim=0)


def weighted_mean(stack: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of each column's values by weight; NaN where there are none.

    Parameters
    ----------
    stack : (updates, entries)
        NaN where an update has none.
    weights : (updates,)
        At least 0.
    """
    held = ~torch.isnan(stack)
    mass = torch.where(held, weights[:, None], 0.0)
    return (stack.nan_to_num() * mass).sum(dim=0) / mass.sum(dim=0)
