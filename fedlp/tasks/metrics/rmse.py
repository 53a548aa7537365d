"""Root mean square error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedlp.registry import register


@register("metric", "rmse")
@dataclass(frozen=True)
class RootMeanSquareError:
    """Root mean square error over examples and values."""

    label: str = "rmse"
    larger_is_better: bool = False

    bounds: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def sums(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor | float]:
        """Return the sum of squared errors and their number."""
        return {"squared": (outputs - targets).double().square().sum(), "count": float(targets.numel())}

    def value(self, sums: Mapping[str, Any]) -> float:
        """Return the root of the mean squared error, in units of the target."""
        return math.sqrt(sums["squared"] / sums["count"])
