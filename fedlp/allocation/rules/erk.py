r"""ERK (Evci et al., ICML 2020): densities in proportion to the sum of a tensor's sizes over their product.

.. math:: d_l \propto \sum_k d_k \Big/ \prod_k d_k

Deviations
----------
The budget is met on the real costs, where the paper takes the parameters of the matrices alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlp.allocation.budget.solve import Cost, allocate_shape
from fedlp.allocation.evidence import Evidence
from fedlp.allocation.layer_metrics import Vector, min_max
from fedlp.allocation.ranges import check_amplitude
from fedlp.registry import register
from fedlp.types import PrunableLayer


@register("allocator", "erk")
@dataclass(frozen=True)
class Erk:
    """Densities in proportion to the sum of a tensor's sizes over their product (ERK).

    Attributes
    ----------
    amplitude : float or None
        Range of the sparsities over the layers, in [0, 2]; the range of the densities if None.
    """

    amplitude: float | None = None

    needs = frozenset({"weights"})

    def __post_init__(self) -> None:
        check_amplitude(self.amplitude)

    def __call__(self, layers: Sequence[PrunableLayer], evidence: Evidence, cost: Cost, limit: float) -> dict[str, int]:
        """Return the units kept of each layer."""
        raw = []
        for layer in layers:
            tensors = evidence.weights[layer.name]
            raw.append(sum(sum(w.shape) for w in tensors) / sum(w.size for w in tensors))
        whole = sum(layer.num_params for layer in layers)
        removed = 1.0 - erk_densities(raw, [layer.num_params / whole for layer in layers], 1.0 - evidence.sparsity)
        shape = {layer.name: float(value) for layer, value in zip(layers, min_max(removed), strict=True)}
        rise = float(removed.max() - removed.min()) if self.amplitude is None else self.amplitude
        return allocate_shape(layers, shape, rise, cost, limit)


def erk_densities(raw: Sequence[float], shares: Sequence[float], density: float) -> Vector:
    """Return densities in proportion to ``raw``, at most 1, whose mean weighted by ``shares`` is ``density``.

    Parameters
    ----------
    raw, shares : sequence of float
        > 0, one per layer; shares sum to 1.
    density : float
        In [0, 1].
    """
    scale, weight = np.asarray(raw, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    dense = np.zeros(len(scale), dtype=bool)
    while not dense.all():
        left = density * weight.sum() - weight[dense].sum()
        found = np.where(dense, 1.0, scale * left / (scale * weight)[~dense].sum())
        full = dense | (found >= 1.0)
        if (full == dense).all():
            return found
        dense = full
    return np.ones(len(scale))
