"""First-order Taylor expansion of the loss, element by element (LLM-Pruner: Ma et al., NeurIPS 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedlp.pruning.scores.view import LayerView
from fedlp.registry import register


@register("score", "taylor")
@dataclass(frozen=True)
class Taylor:
    """Weight times gradient of all parameters of a unit: sum of |w ∂L/∂w|."""

    needs = frozenset({"weights", "gradients"})

    def __call__(self, view: LayerView) -> Tensor:
        """Return the saliency of each unit, (units,), float64."""
        parameters = view.parameters  # among them biases that pruning has added, which have no gradient
        return view.sum_coupled({name: (parameters[name] * grad).abs() for name, grad in view.gradients.items()})
