"""HeteroFL (Diao et al., ICLR 2021): static width slices, the first units of every axis."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedlp.federation.strategies.width_slices import WidthStrategy
from fedlp.registry import register


@register("strategy", "heterofl")
@dataclass(frozen=True)
class HeteroFL(WidthStrategy):
    """Static width slices, the first units of every axis (Diao et al., 2021)."""

    widths: list[float] = field(default_factory=lambda: [1.0, 0.5, 0.25, 0.125, 0.0625])
