"""Structured optimal brain surgeon, in exact greedy order; see :mod:`fedlp.pruning.kernels.obs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlp.pruning.costs.elimination import elimination_macs, quick_elimination_macs
from fedlp.pruning.kernels.elimination import Score
from fedlp.pruning.kernels.obs import Elimination, eliminate
from fedlp.pruning.scores.view import LayerView
from fedlp.registry import register


@register("score", "obs")
@dataclass(frozen=True)
class OBS:
    """Optimal brain surgeon: increase of the layer's output error, with optimal compensation by the kept units."""

    needs = frozenset({"weights", "moments"})
    form: ClassVar[Score] = "exact"

    def schedule(self, view: LayerView, total: int) -> list[int]:
        """Return the number of units that each step removes, summing to ``total``."""
        return view.precision.schedule(total)

    def eliminate(self, view: LayerView, count: int) -> Elimination:
        """Return the order in which ``count`` units are removed, and the losses along it."""
        problems = [reader.problem(view.precision.outputs, view.generator) for reader in view.readers]
        steps, precision = self.schedule(view, count), view.precision
        return eliminate(problems, steps, score=self.form, block=precision.block, large_steps=precision.is_quick)

    def __call__(self, view: LayerView) -> Tensor:
        """Return the loss increase of each unit's removal in order, (units,), float64, non-decreasing along the order.

        The unit that is never removed has the saliency of the last one removed.
        """
        if view.num_units == 1:
            return Elimination((), (), ()).saliency(1)
        return self.eliminate(view, view.num_units - 1).saliency(view.num_units)

    def macs(self, view: LayerView) -> float:
        """Return the multiply-accumulates of inverting the readers' Hessians and eliminating all units but one."""
        if view.num_units == 1:
            return 0.0
        schedule, price = self.schedule(view, view.num_units - 1), 0.0
        for reader in view.readers:
            outputs, columns = reader.weight.shape
            precision = view.precision
            rows = min(outputs, precision.outputs or outputs)
            count = quick_elimination_macs if precision.is_quick else elimination_macs
            price += count(reader.count, columns, rows, reader.unit_size, schedule, precision.block)
        return price
