r"""DLP (Chen et al., ICML 2025): higher sparsity for layers with a higher median of Wanda's metric.

.. math:: z = n(\text{median of Wanda's metric}), \qquad a = 2 \alpha(S) = 0.08, 0.2, 0.3 \text{ at } S = 0.5, 0.6, 0.7.

Deviations
----------
The amplitude is that of the paper's table, linear in between, and that of the nearest entry outside. The budget is met
on the real costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlp.allocation.budget.solve import Cost, allocate_shape
from fedlp.allocation.evidence import Evidence
from fedlp.allocation.layer_metrics import min_max
from fedlp.allocation.ranges import check_amplitude
from fedlp.registry import register
from fedlp.types import PrunableLayer

_SPARSITIES, _AMPLITUDES = (0.5, 0.6, 0.7), (0.08, 0.2, 0.3)  # 2 α


@register("allocator", "dlp")
@dataclass(frozen=True)
class Dlp:
    """Higher sparsity for layers with a higher median of Wanda's metric (DLP).

    Attributes
    ----------
    amplitude : float or None
        Range of the sparsities over the layers, in [0, 2]; that of the paper's table if None.
    """

    amplitude: float | None = None

    needs = frozenset({"weights", "input_norms"})

    def __post_init__(self) -> None:
        check_amplitude(self.amplitude)

    def __call__(self, layers: Sequence[PrunableLayer], evidence: Evidence, cost: Cost, limit: float) -> dict[str, int]:
        """Return the units kept of each layer."""
        z = min_max([layer.table["wanda", "id", "median"] for layer in evidence.wanda_statistics])
        shape = {layer.name: float(value) for layer, value in zip(layers, z, strict=True)}
        published = float(np.interp(evidence.sparsity, _SPARSITIES, _AMPLITUDES))
        return allocate_shape(layers, shape, published if self.amplitude is None else self.amplitude, cost, limit)
