"""Logarithmic depth: sparsity rises with the logarithm of depth (SlimGPT, Ling et al., NeurIPS 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedlp.allocation.budget.solve import Cost, allocate_shape
from fedlp.allocation.evidence import Evidence
from fedlp.allocation.ranges import check_amplitude
from fedlp.registry import register
from fedlp.types import PrunableLayer

# SlimGPT's curves rise by 0.1875 at 20 % and by 0.53 at 50 %: their amplitude as a power of the mean sparsity.
_SCALE, _POWER = 1.16, 1.134


@register("allocator", "log_depth")
@dataclass(frozen=True)
class LogDepth:
    """Sparsity rises with the logarithm of depth (SlimGPT).

    Attributes
    ----------
    amplitude : float or None
        Rise of the sparsity from the first layer to the last, in [0, 2]; that of the published curves if None.
    """

    amplitude: float | None = None

    needs = frozenset[str]()

    def __post_init__(self) -> None:
        check_amplitude(self.amplitude)

    def __call__(self, layers: Sequence[PrunableLayer], evidence: Evidence, cost: Cost, limit: float) -> dict[str, int]:
        """Return the units kept of each layer."""
        count = len({layer.depth for layer in layers})
        rise = _SCALE * evidence.sparsity**_POWER if self.amplitude is None else self.amplitude
        shape = {x.name: math.log(x.depth * (count - 1) + 1) / math.log(count) if count > 1 else 0.0 for x in layers}
        return allocate_shape(layers, shape, rise, cost, limit)
