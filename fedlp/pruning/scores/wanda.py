"""Wanda (Sun et al., ICLR 2024) over structures: Wanda-sp (An et al., AAAI 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedlp.pruning.scores.view import LayerView
from fedlp.registry import register


@register("score", "wanda")
@dataclass(frozen=True)
class Wanda:
    """Weight magnitude times input norm, summed over a unit: |W_ij| times the root mean square of x_j."""

    needs = frozenset({"weights", "input_norms"})

    def __call__(self, view: LayerView) -> Tensor:
        """Return the saliency of each unit, (units,), float64."""
        return view.sum_columns(lambda reader: reader.weight.abs().sum(dim=0) * reader.square_mean.sqrt())
