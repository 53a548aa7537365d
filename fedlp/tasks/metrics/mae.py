"""Mean absolute error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedlp.registry import register


@register("metric", "mae")
@dataclass(frozen=True)
class MeanAbsoluteError:
    """Mean absolute error over examples and values."""

    label: str = "mae"
    larger_is_better: bool = False

    bounds: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def sums(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor | float]:
        """Return the sum of absolute errors and their number."""
        return {"absolute": (outputs - targets).abs().double().sum(), "count": float(targets.numel())}

    def value(self, sums: Mapping[str, Any]) -> float:
        """Return the mean absolute error, in units of the target."""
        return float(sums["absolute"] / sums["count"])
