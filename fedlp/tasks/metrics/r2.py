"""Coefficient of determination."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedlp.registry import register


@register("metric", "r2")
@dataclass(frozen=True)
class R2:
    """Coefficient of determination: share of the targets' variance that is predicted, averaged over values."""

    label: str = "r2"
    larger_is_better: bool = True

    bounds: ClassVar[tuple[float, float]] = (-math.inf, 1.0)

    def sums(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor | float]:
        """Return sums of squared errors, targets and their squares, (values,), and the number of examples."""
        wanted = targets.double().reshape(len(targets), -1)
        errors = outputs.double().reshape(len(targets), -1) - wanted
        return {
            "errors": errors.square().sum(dim=0),
            "targets": wanted.sum(dim=0),
            "squares": wanted.square().sum(dim=0),
            "count": float(len(targets)),
        }

    def value(self, sums: Mapping[str, Any]) -> float:
        """Return 1 - errors / variance, at most 1; nan if all targets are equal."""
        spreads = [
            square - total**2 / sums["count"] for square, total in zip(sums["squares"], sums["targets"], strict=True)
        ]
        if min(spreads) <= 0:
            return float("nan")
        parts = [1 - error / spread for error, spread in zip(sums["errors"], spreads, strict=True)]
        return float(sum(parts) / len(parts))
