"""Perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedlp.registry import register


@register("metric", "perplexity")
@dataclass(frozen=True)
class Perplexity:
    """Exponential of the mean loss, which must be a cross-entropy in nats."""

    label: str = "perplexity"
    larger_is_better: bool = False

    bounds: ClassVar[tuple[float, float]] = (1.0, math.inf)

    def sums(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor | float]:
        """Return no sums: the task's own loss and count suffice."""
        return {}

    def value(self, sums: Mapping[str, Any]) -> float:
        """Return the perplexity, >= 1; infinite beyond the range of floats."""
        loss = float(sums["loss"] / sums["count"])
        return math.exp(loss) if loss < 700 else math.inf
