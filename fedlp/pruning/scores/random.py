"""Random saliency, the baseline of scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlp.pruning.scores.view import LayerView
from fedlp.registry import register


@register("score", "random")
@dataclass(frozen=True)
class Random:
    """Uniformly random saliency."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, view: LayerView) -> Tensor:
        """Return a random saliency of each unit in [0, 1), (units,), float64."""
        return torch.rand(view.num_units, generator=view.generator, dtype=torch.float64)
