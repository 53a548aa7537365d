"""Evidence: measurements of a model for allocation rules, each made on first use.

========== ======================================================================================= ==================
need       per layer                                                                               where it is known
========== ======================================================================================= ==================
weights    matrices or kernels that read the layer's units                                         model
input_norms mean square of each column that they read                                              sums over clients
unit_scores saliency of each unit, by the pruner's score                                           means over clients
error_curves loss over units removed                                                               unit scores, or data
model      sensitivity of the whole model's output to the layer, by Kullback-Leibler divergence    model and data
========== ======================================================================================= ==================

A rule lists its ``needs``; a round refuses a rule whose needs cannot be met there before the run begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedlp.allocation.budget.solve import Cost
from fedlp.allocation.layer_metrics import LayerStatistics, compute_statistics, wanda_elements
from fedlp.errors import AllocationError
from fedlp.types import PrunableLayer

Array = NDArray[np.floating[Any]]
NEEDS = ("weights", "input_norms", "unit_scores", "error_curves", "model")


class ByLayer(Mapping[str, Any]):
    """Mapping whose values are computed anew at each access, since all of them together may be larger than the model.

    Parameters
    ----------
    names : sequence of str
        Layers, in order.
    compute : callable
        Returns the value of one layer.
    """

    def __init__(self, names: Sequence[str], compute: Callable[[str], Any]) -> None:
        self._names, self._compute = tuple(names), compute

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class AllocationRule(Protocol):
    """Protocol of the kind ``allocator``; functions of these parameters qualify."""

    def __call__(
        self, layers: Sequence[PrunableLayer], evidence: Evidence, cost: Cost, limit: float
    ) -> Mapping[str, int]:
        """Return the units kept of each layer, at least one, of a cost of at most ``limit``."""


def needs_of(rule: object) -> frozenset[str]:
    """Return the evidence that a rule reads; AllocationError for an unknown need."""
    found = frozenset(getattr(getattr(rule, "func", rule), "needs", ()))
    if unknown := sorted(found - set(NEEDS)):
        raise AllocationError(f"allocator {rule!r} needs {unknown[0]}, which is none of {', '.join(NEEDS)}")
    return found


class Evidence:
    """Measurements of a model's prunable layers.

    Parameters
    ----------
    layers : sequence of PrunableLayer
    sparsity : float
        Mean sparsity that corresponds to the limit, in [0, 1].
    **suppliers : callable
        One function without arguments per need of ``NEEDS`` that can be met.
    """

    def __init__(self, layers: Sequence[PrunableLayer], sparsity: float, **suppliers: Callable[[], Any]) -> None:
        self.layers, self.sparsity = layers, sparsity
        self._suppliers = suppliers

    def at(self, sparsity: float) -> Evidence:
        """Return the same evidence for another mean sparsity."""
        return Evidence(self.layers, sparsity, **self._suppliers)

    def has(self, need: str) -> bool:
        """Return whether a need can be met."""
        return need in self._suppliers

    @cached_property
    def weights(self) -> Mapping[str, Sequence[Array]]:
        """Weights of the modules that read each layer, (out, in) or (out, in, height, width)."""
        return self._get("weights")  # type: ignore[no-any-return]

    @cached_property
    def input_norms(self) -> Mapping[str, Sequence[Array]]:
        """Mean square of each column of those weights' inputs, (columns,) per module."""
        return self._get("input_norms")  # type: ignore[no-any-return]

    @cached_property
    def unit_scores(self) -> Mapping[str, Array]:
        """Saliency of each unit, (units,), >= 0."""
        return self._get("unit_scores")  # type: ignore[no-any-return]

    @cached_property
    def error_curves(self) -> Mapping[str, Sequence[float]]:
        """Loss after one, two, ... units removed; comparable between layers."""
        return self._get("error_curves")  # type: ignore[no-any-return]

    @cached_property
    def statistics(self) -> Sequence[LayerStatistics]:
        """Statistics for searched functions: reductions of elements, sensitivities, error curves at one half."""
        return self._get("model")  # type: ignore[no-any-return]

    @cached_property
    def wanda(self) -> Mapping[str, Array]:
        r"""Wanda's metric :math:`|W_{ij}| \sqrt{E x_j^2}` (Sun et al., ICLR 2024) of each layer's elements, flat."""
        return ByLayer([layer.name for layer in self.layers], self._wanda_of)

    def _wanda_of(self, name: str) -> Array:
        pairs = zip(self.weights[name], self.input_norms[name], strict=True)
        return np.concatenate([wanda_elements(w.reshape(len(w), -1), squares).ravel() for w, squares in pairs])

    @cached_property
    def wanda_statistics(self) -> Sequence[LayerStatistics]:
        """Reductions of Wanda's metric alone."""
        elements = ByLayer([layer.name for layer in self.layers], lambda name: {"wanda": self._wanda_of(name)})
        return compute_statistics(self.layers, elements)

    def _get(self, need: str) -> Any:
        if need not in self._suppliers:
            raise AllocationError(f"there are no {need.replace('_', ' ')} here; choose another allocator")
        return self._suppliers[need]()
