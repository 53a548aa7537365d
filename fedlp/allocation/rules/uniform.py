"""Uniform: the same sparsity in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlp.allocation.budget.solve import Cost, allocate_shape
from fedlp.allocation.evidence import Evidence
from fedlp.registry import register
from fedlp.types import PrunableLayer


@register("allocator", "uniform")
@dataclass(frozen=True)
class Uniform:
    """The same sparsity in every layer."""

    needs = frozenset[str]()

    def __call__(self, layers: Sequence[PrunableLayer], evidence: Evidence, cost: Cost, limit: float) -> dict[str, int]:
        """Return the units kept of each layer."""
        return allocate_shape(layers, dict.fromkeys((layer.name for layer in layers), 0.0), 0.0, cost, limit)
