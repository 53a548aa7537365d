"""Macro-F1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlp.registry import register


@register("metric", "macro_f1")
@dataclass(frozen=True)
class MacroF1:
    """Mean over classes of F1, the harmonic mean of precision and recall; classes that never occur are left out."""

    label: str = "macro_f1"
    larger_is_better: bool = True

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def sums(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor | float]:
        """Return true positives, predicted and actual positives of each class or label, (classes,)."""
        classes = outputs.shape[-1]
        wanted = targets.bool() if targets.ndim == 2 else F.one_hot(targets, classes).bool()
        found = outputs > 0 if targets.ndim == 2 else F.one_hot(outputs.argmax(dim=-1), classes).bool()
        parts = {"right": wanted & found, "predicted": found, "true": wanted}
        return {key: part.sum(dim=0).to(torch.float64) for key, part in parts.items()}

    def value(self, sums: Mapping[str, Any]) -> float:
        """Return the mean of 2 right / (predicted + true), in [0, 1]; 0 where no class occurs."""
        rows = zip(sums["right"], sums["predicted"], sums["true"], strict=True)
        scores = [2 * right / (predicted + true) for right, predicted, true in rows if predicted + true]
        return sum(scores) / len(scores) if scores else 0.0
