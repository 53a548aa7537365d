"""Updates of low-rank adapters held until a round's end, for rules that combine a client's A and B together.

An adapter of a layer has A (r, in) and B (out, r), tensors ``PATH.lora_a`` and ``PATH.lora_b``. A client may hold the
first ranks alone, and a slice of the layer. All other tensors are averaged by coverage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.federation.aggregation.coverage import Keeps
from fedlp.federation.aggregation.coverage_average import CoverageAverage

_A, _B = ".lora_a", ".lora_b"


@dataclass(frozen=True)
class AdapterUpdate:
    """A client's adapter of one layer, at the global coordinates of its slice.

    Attributes
    ----------
    a : (ranks, columns)
    b : (rows, ranks)
        Both float64.
    rows, columns : (count,) int64
        Outputs and inputs of the layer that the client holds.
    weight : float
        Weight of the client, > 0.
    """

    a: Tensor
    b: Tensor
    rows: Tensor
    columns: Tensor
    weight: float


class AdapterUpdates(ABC):
    """Accumulator that holds the adapters of a round.

    Parameters
    ----------
    params : mapping from tensor name to Tensor
        Current global values. Not modified.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = params
        self._others = CoverageAverage(params)
        self._held: dict[str, list[AdapterUpdate]] = {}

    def add(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weight: float) -> None:
        """Hold a client's adapters; ValueError if half of one is missing."""
        paths = sorted({name.rpartition(".")[0] for name in params if name.endswith((_A, _B))})
        self._others.add({n: x for n, x in params.items() if not n.endswith((_A, _B))}, keeps, weight)
        for path in paths:
            if not {path + _A, path + _B} <= params.keys():
                raise ValueError(f"an update holds one half of the adapter of {path}")
            a, b = params[path + _A].to(torch.float64), params[path + _B].to(torch.float64)
            rows = _indices(keeps.get(path + _B), 0, len(b))
            columns = _indices(keeps.get(path + _A), 1, a.shape[1])
            self._held.setdefault(path, []).append(AdapterUpdate(a.clone(), b.clone(), rows, columns, weight))

    @torch.no_grad()
    def result(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the new global values, and the covered fraction of each tensor; adapters count as whole."""
        params, coverage = self._others.result()
        for path, updates in self._held.items():
            for name, values in self.combine(path, updates).items():
                params[name], coverage[name] = values.to(params[name].dtype), 1.0
        return params, coverage

    def covered(self, name: str) -> bool | Tensor:
        """Return which entries have an update; of a returned adapter all."""
        return name.rpartition(".")[0] in self._held if name.endswith((_A, _B)) else self._others.covered(name)

    @abstractmethod
    def combine(self, path: str, updates: Sequence[AdapterUpdate]) -> dict[str, Tensor]:
        """Return the new values of a layer's tensors by name, float64."""

    def before(self, path: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a layer before the round, float64."""
        return self.params[path + _A].to(torch.float64), self.params[path + _B].to(torch.float64)

    def mean_product(self, path: str, updates: Sequence[AdapterUpdate]) -> Tensor:
        """Return the weighted mean of the products B A over the holders of each entry, (out, in), float64.

        An entry without a holder has the product before the round.
        """
        a, b = self.before(path)
        total = torch.zeros(len(b), a.shape[1], dtype=torch.float64)
        mass = torch.zeros_like(total)
        for update in updates:
            place = update.rows[:, None], update.columns[None, :]
            total[place] += update.weight * (update.b @ update.a)
            mass[place] += update.weight
        return torch.where(mass > 0, total / mass.clamp(min=torch.finfo(torch.float64).tiny), b @ a)


def adapter_names(path: str) -> tuple[str, str]:
    """Return the names of A and B of a layer."""
    return path + _A, path + _B


def _indices(keeps: Keeps | None, dim: int, size: int) -> Tensor:
    return torch.arange(size) if keeps is None else torch.from_numpy(keeps[dim].indices())
