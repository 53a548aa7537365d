"""FLAP's allocation: the units of all layers compete by their standardised scores (An et al., AAAI 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlp.allocation.budget.solve import Cost, check_reachable, round_units
from fedlp.allocation.evidence import Evidence
from fedlp.registry import register
from fedlp.types import PrunableLayer


@register("allocator", "flap")
@dataclass(frozen=True)
class Flap:
    """Global ranking of all units by standardised scores, lowest pruned first (FLAP)."""

    needs = frozenset({"unit_scores"})

    def __call__(self, layers: Sequence[PrunableLayer], evidence: Evidence, cost: Cost, limit: float) -> dict[str, int]:
        """Return the units kept of each layer."""
        return allocate_pooled(layers, evidence.unit_scores, cost, limit)


def allocate_pooled(
    layers: Sequence[PrunableLayer], scores: Mapping[str, NDArray[np.floating[Any]]], cost: Cost, limit: float
) -> dict[str, int]:
    """Return the units kept of each layer by a global ranking of standardised scores, lowest pruned first (FLAP).

    Scores are standardised layer by layer; units go from the lowest on until the limit is met, and at least one of each
    layer stays, or none where its residual branch may go as a whole.
    """
    check_reachable(layers, cost, limit)
    rows: list[tuple[float, str]] = []
    for layer in layers:
        values = np.asarray(scores[layer.name], dtype=np.float64)
        spread = values.std() or 1.0
        standard = np.sort((values - values.mean()) / spread)
        rows += [(score, layer.name) for score in standard[: layer.num_units - layer.least]]
    rows.sort()
    low, high = 0, len(rows)

    def kept_after(count: int) -> dict[str, int]:
        kept = {layer.name: layer.num_units for layer in layers}
        for _, name in rows[:count]:
            kept[name] -= 1
        return kept

    while low < high:
        middle = (low + high) // 2
        if cost(kept_after(middle)) <= limit:
            high = middle
        else:
            low = middle + 1
    kept = kept_after(low)
    return round_units(layers, {x.name: 1.0 - kept[x.name] / x.num_units for x in layers}, cost, limit)
