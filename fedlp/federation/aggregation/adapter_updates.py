"""Updates of low-rank adapters held until a round's end, for rules that combine a client's A and B together.

An adapter of a layer has A (r, in) and B (out, r), tensors ``PATH.lora_a`` and ``PATH.lora_b``. A client may hold the
first ranks alone, and a slice of the layer. All other tensors are averaged by coverage. Norms of updates are bounded as
for the coverage average (:mod:`~fedlp.federation.aggregation.norm_bounds`), before A and B are multiplied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlp.federation.aggregation.coverage import Keeps
from fedlp.federation.aggregation.coverage_average import CoverageAverage, WeightedUpdate
from fedlp.federation.aggregation.norm_bounds import check_multiples, clipping_scales, squared_norm
from fedlp.pruning.tracing.widths import slice_tensor

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


@dataclass(frozen=True)
class AdapterRule(ABC):
    """Aggregator that combines adapters, of bounded norms and weights.

    Attributes
    ----------
    max_norm, max_examples : float or None
        As of ``coverage_average``, >= 1; None for no bound.
    """

    max_norm: float | None = 3.0
    max_examples: float | None = 10.0

    combines_adapters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_multiples(max_norm=self.max_norm, max_examples=self.max_examples)

    @abstractmethod
    def begin(self, params: Mapping[str, Tensor]) -> AdapterUpdates:
        """Return an accumulator, which holds the adapters of the round."""


class AdapterUpdates(ABC):
    """Accumulator that holds the adapters of a round.

    Parameters
    ----------
    params : mapping from tensor name to Tensor
        Current global values. Not modified.
    max_norm : float or None
        Largest norm of an update, as a multiple of a typical one's, >= 1; None for no bound.

    Attributes
    ----------
    scales : list of float
        Factor of each update's differences, in the order of their arrival; known after :meth:`result`.
    """

    def __init__(self, params: Mapping[str, Tensor], max_norm: float | None = None) -> None:
        self.params, self._max_norm = params, max_norm
        self._others = CoverageAverage(params)
        self._updates: list[WeightedUpdate] = []
        self._held: dict[str, list[AdapterUpdate]] = {}
        self.scales: list[float] = []

    def add(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weight: float) -> None:
        """Hold a client's update; ValueError if half of an adapter is missing."""
        for path in _paths(params):
            if not {path + _A, path + _B} <= params.keys():
                raise ValueError(f"an update holds one half of the adapter of {path}")
            self._held.setdefault(path, [])
        self._updates.append((params, keeps, weight))

    @torch.no_grad()
    def result(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the new global values, and the covered fraction of each tensor; adapters count as whole."""
        self.scales = self._find_scales()
        for (params, keeps, weight), scale in zip(self._updates, self.scales, strict=True):
            self._take(self._scaled(params, keeps, scale), keeps, weight)
        params, coverage = self._others.result()
        for path, updates in self._held.items():
            for name, values in self.combine(path, updates).items():
                params[name], coverage[name] = values.to(params[name].dtype), 1.0
        return params, coverage

    def covered(self, name: str) -> bool | Tensor:
        """Return which entries have an update; of a returned adapter all."""
        return name.rpartition(".")[0] in self._held if name.endswith((_A, _B)) else self._others.covered(name)

    def _find_scales(self) -> list[float]:
        """Return the factor of each update's differences, in (0, 1]."""
        if self._max_norm is None:
            return [1.0] * len(self._updates)
        squares = [
            {
                name: (squared_norm(values, self._before(name, keeps)), values.numel())
                for name, values in params.items()
                if values.is_floating_point() and values.numel()
            }
            for params, keeps, _ in self._updates
        ]
        return clipping_scales(squares, self._max_norm)

    def _scaled(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], scale: float) -> Mapping[str, Tensor]:
        """Return an update with the differences of its floating-point tensors scaled, float64; itself for 1."""
        if scale == 1.0:
            return params
        found = dict(params)
        for name, values in params.items():
            if values.is_floating_point():
                before = self._before(name, keeps).to(torch.float64)
                found[name] = before + scale * (values.to(torch.float64) - before)
        return found

    def _take(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weight: float) -> None:
        """Divide a bounded update into adapters and other tensors."""
        self._others.add({n: x for n, x in params.items() if not n.endswith((_A, _B))}, keeps, weight)
        for path in _paths(params):
            a, b = params[path + _A].to(torch.float64), params[path + _B].to(torch.float64)
            rows = _indices(keeps.get(path + _B), 0, len(b))
            columns = _indices(keeps.get(path + _A), 1, a.shape[1])
            self._held[path].append(AdapterUpdate(a, b, rows, columns, weight))

    def _before(self, name: str, keeps: Mapping[str, Keeps]) -> Tensor:
        """Return the values before the round of the entries that an update covers."""
        return slice_tensor(self.params[name], keeps[name]) if name in keeps else self.params[name]

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


def _paths(params: Mapping[str, Tensor]) -> list[str]:
    """Return the layers with an adapter, or half of one, in an update; sorted."""
    return sorted({name.rpartition(".")[0] for name in params if name.endswith((_A, _B))})


def _indices(keeps: Keeps | None, dim: int, size: int) -> Tensor:
    return torch.arange(size) if keeps is None else torch.from_numpy(keeps[dim].indices())
