"""Magnitude of weights (Li et al., ICLR 2017), over groups of coupled parameters (Fang et al., CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedlp.pruning.scores.view import LayerView
from fedlp.registry import register


@register("score", "magnitude")
@dataclass(frozen=True)
class Magnitude:
    """Squared norm of all parameters of a unit: sum of w²."""

    needs = frozenset({"weights"})

    def __call__(self, view: LayerView) -> Tensor:
        """Return the saliency of each unit, (units,), float64."""
        parameters = view.parameters
        return view.sum_coupled({name: parameters[name].square() for name in view.layer.coupled if name in parameters})
