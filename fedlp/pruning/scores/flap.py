"""FLAP's fluctuation metric, WIFV (An et al., AAAI 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedlp.pruning.scores.view import LayerView
from fedlp.registry import register


@register("score", "flap")
@dataclass(frozen=True)
class Flap:
    """Squared weight times input variance, summed over a unit: W_ij² times the variance of x_j."""

    needs = frozenset({"weights", "input_norms"})

    def __call__(self, view: LayerView) -> Tensor:
        """Return the saliency of each unit, (units,), float64."""
        return view.sum_columns(lambda reader: reader.weight.square().sum(dim=0) * reader.variance)
