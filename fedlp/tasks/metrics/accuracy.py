"""Accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedlp.registry import register


@register("metric", "accuracy")
@dataclass(frozen=True)
class Accuracy:
    """Share of correct predictions; for several labels the share over examples and labels, at a threshold of 1/2."""

    label: str = "accuracy"
    larger_is_better: bool = True

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def sums(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor | float]:
        """Return the number of correct predictions and of all."""
        right = (outputs > 0) == targets.bool() if targets.ndim == 2 else outputs.argmax(dim=-1) == targets
        return {"correct": right.sum(), "count": float(right.numel())}

    def value(self, sums: Mapping[str, Any]) -> float:
        """Return the accuracy, in [0, 1]."""
        return float(sums["correct"] / sums["count"])
