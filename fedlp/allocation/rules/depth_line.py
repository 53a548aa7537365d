"""Depth line: sparsity rises linearly with depth (ATP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlp.allocation.budget.solve import Cost, allocate_shape
from fedlp.allocation.evidence import Evidence
from fedlp.allocation.ranges import check_amplitude
from fedlp.registry import register
from fedlp.types import PrunableLayer

_SCALE = 0.6  # ATP's lines at 70 % of LLaMA rise by about 0.4


@register("allocator", "depth_line")
@dataclass(frozen=True)
class DepthLine:
    """Sparsity rises linearly with depth (ATP).

    Attributes
    ----------
    amplitude : float or None
        Rise of the sparsity from the first layer to the last, in [0, 2]; 0.6 times the mean sparsity if None.
    """

    amplitude: float | None = None

    needs = frozenset[str]()

    def __post_init__(self) -> None:
        check_amplitude(self.amplitude)

    def __call__(self, layers: Sequence[PrunableLayer], evidence: Evidence, cost: Cost, limit: float) -> dict[str, int]:
        """Return the units kept of each layer."""
        rise = _SCALE * evidence.sparsity if self.amplitude is None else self.amplitude
        return allocate_shape(layers, {layer.name: layer.depth for layer in layers}, rise, cost, limit)
