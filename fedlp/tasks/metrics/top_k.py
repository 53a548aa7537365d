"""Top-k accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedlp.registry import register


@register("metric", "top_k")
@dataclass(frozen=True)
class TopK:
    """Share of predictions whose class is among the k likeliest."""

    k: int = 5
    larger_is_better: bool = True

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @property
    def label(self) -> str:
        """``top_5`` for k = 5."""
        return f"top_{self.k}"

    def sums(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor | float]:
        """Return the number of correct predictions and of all."""
        best = outputs.topk(min(self.k, outputs.shape[-1]), dim=-1).indices
        return {"correct": (best == targets[:, None]).any(dim=-1).sum(), "count": float(len(targets))}

    def value(self, sums: Mapping[str, Any]) -> float:
        """Return the accuracy, in [0, 1]."""
        return float(sums["correct"] / sums["count"])
