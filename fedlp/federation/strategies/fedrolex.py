"""FedRolex (Alam et al., NeurIPS 2022): a width window that moves by one unit every round."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fedlp.federation.strategies.width_slices import WidthStrategy
from fedlp.registry import register


@register("strategy", "fedrolex")
@dataclass(frozen=True)
class FedRolex(WidthStrategy):
    """A width window that moves by one unit every round (Alam et al., 2022)."""

    widths: list[float] = field(default_factory=lambda: [1.0, 0.5, 0.25, 0.125, 0.0625])

    rolls: ClassVar[bool] = True
