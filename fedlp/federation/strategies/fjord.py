"""FjORD (Horvath et al., NeurIPS 2021): nested widths; each local step draws one up to the client's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fedlp.federation.strategies.width_slices import WidthStrategy
from fedlp.registry import register


@register("strategy", "fjord")
@dataclass(frozen=True)
class FjORD(WidthStrategy):
    """Nested widths; each local step draws one up to the client's (Horvath et al., 2021)."""

    widths: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.6, 0.8, 1.0])

    nests: ClassVar[bool] = True
