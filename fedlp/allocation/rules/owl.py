r"""OWL (Yin et al., ICML 2024): lower sparsity for layers with more outliers of Wanda's metric.

.. math:: z = 1 - n(\text{fraction of elements above 5 times the mean}), \qquad a = 2 \lambda = 0.16,

with n the min-max normalisation over the layers.

Deviations
----------
The budget is met on the real costs, where the paper takes an unweighted mean over blocks; a layer is a width axis,
removed from, not a decoder block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlp.allocation.budget.solve import Cost, allocate_shape
from fedlp.allocation.evidence import Evidence
from fedlp.allocation.layer_metrics import min_max, outlier_fraction
from fedlp.allocation.ranges import check_amplitude
from fedlp.registry import register
from fedlp.types import PrunableLayer

_AMPLITUDE = 0.16  # 2 λ


@register("allocator", "owl")
@dataclass(frozen=True)
class Owl:
    """Lower sparsity for layers with more outliers of Wanda's metric (OWL).

    Attributes
    ----------
    amplitude : float or None
        Range of the sparsities over the layers, in [0, 2]; 0.16 if None.
    """

    amplitude: float | None = None

    needs = frozenset({"weights", "input_norms"})

    def __post_init__(self) -> None:
        check_amplitude(self.amplitude)

    def __call__(self, layers: Sequence[PrunableLayer], evidence: Evidence, cost: Cost, limit: float) -> dict[str, int]:
        """Return the units kept of each layer."""
        outliers = [outlier_fraction(evidence.wanda[x.name], f"layer {x.name}: wanda") for x in layers]
        z = min_max([-value for value in outliers])
        shape = {layer.name: float(value) for layer, value in zip(layers, z, strict=True)}
        return allocate_shape(layers, shape, _AMPLITUDE if self.amplitude is None else self.amplitude, cost, limit)
