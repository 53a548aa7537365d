r"""Dynamic programme over error curves: least sum of the layers' losses within the budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedlp.allocation.budget.filling import fill_units
from fedlp.allocation.budget.solve import Cost, check_reachable
from fedlp.allocation.evidence import Evidence
from fedlp.registry import register
from fedlp.types import PrunableLayer

_LEAST_PRICE = 1e-9  # of the dearest unit's
_FIRST_ROUNDS, _MEAN_ROUNDS = 4, 8  # of prices: as they are near the last solution, and means


@register("allocator", "dp")
@dataclass(frozen=True)
class DynamicProgramme:
    """Least sum of the layers' losses, by error curves."""

    needs = frozenset({"error_curves"})

    def __call__(self, layers: Sequence[PrunableLayer], evidence: Evidence, cost: Cost, limit: float) -> dict[str, int]:
        """Return the units kept of each layer."""
        return allocate_by_curves(layers, evidence.error_curves, cost, limit)


def allocate_by_curves(
    layers: Sequence[PrunableLayer], curves: Mapping[str, Sequence[float]], cost: Cost, limit: float
) -> dict[str, int]:
    r"""Return the units kept of each layer that minimise the sum of their losses within the limit.

    Minimises :math:`\sum_i \ell_i(k_i) + \lambda c_i (n_i - k_i)` layer by layer, as a Lagrangian; :math:`\lambda` is
    the least multiplier that meets the limit. Unit costs :math:`c_i` are those near the solution, found in a few
    rounds. If the cost is the largest of several loads, that of one alone would be met by units that cost another
    little: in later rounds unit costs are means over the rounds, in which the loads take turns (a subgradient of the
    largest). The result is the best of all rounds.

    Parameters
    ----------
    curves : mapping from layer name to sequence of float
        :math:`\ell_i` after one, two, ... units removed (at most all but the fewest); comparable between layers.
    """
    layers = [replace(x, least=max(x.least, x.num_units - len(curves[x.name]))) for x in layers]
    check_reachable(layers, cost, limit)
    losses = {name: np.concatenate(([0.0], curve)) for name, curve in curves.items()}
    kept = {layer.name: layer.num_units for layer in layers}
    prices = dict.fromkeys(kept, 0.0)
    best: dict[str, int] = {}
    least = math.inf
    for share in (*[1.0] * _FIRST_ROUNDS, *(2.0 / (number + 3) for number in range(_MEAN_ROUNDS))):
        near = {layer.name: _unit_price(layer, kept, cost) for layer in layers}
        prices = {name: (1.0 - share) * prices[name] + share * price for name, price in near.items()}
        kept = _meet_limit(layers, losses, prices, cost, limit)
        filled = _refill(layers, losses, kept, cost, limit)
        total = sum(float(losses[layer.name][layer.num_units - filled[layer.name]]) for layer in layers)
        if not best or total < least:
            best, least = filled, total
    return best


def _meet_limit(
    layers: Sequence[PrunableLayer],
    losses: Mapping[str, NDArray[np.float64]],
    prices: Mapping[str, float],
    cost: Cost,
    limit: float,
) -> dict[str, int]:
    """Return the units kept of each layer at these prices and the least multiplier that meets the limit."""
    floor = _LEAST_PRICE * (max(prices.values()) or 1.0)  # so that every unit goes at some multiplier
    prices = {name: max(price, floor) for name, price in prices.items()}
    low, high = 0.0, 1.0
    while cost(_cheapest(layers, losses, prices, high)) > limit:
        low, high = high, 4.0 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        if cost(_cheapest(layers, losses, prices, middle)) > limit:
            low = middle
        else:
            high = middle
    return _cheapest(layers, losses, prices, high)


def _unit_price(layer: PrunableLayer, kept: Mapping[str, int], cost: Cost) -> float:
    units = kept[layer.name] or 0.5
    return 2.0 * (cost({**kept, layer.name: units}) - cost({**kept, layer.name: units - 0.5}))


def _cheapest(
    layers: Sequence[PrunableLayer],
    losses: Mapping[str, NDArray[np.float64]],
    prices: Mapping[str, float],
    multiplier: float,
) -> dict[str, int]:
    kept = {}
    for layer in layers:
        loss = losses[layer.name]
        removed = int(np.argmin(loss - multiplier * prices[layer.name] * np.arange(len(loss))))
        kept[layer.name] = layer.num_units - removed
    return kept


def _refill(
    layers: Sequence[PrunableLayer],
    losses: Mapping[str, NDArray[np.float64]],
    kept: Mapping[str, int],
    cost: Cost,
    limit: float,
) -> dict[str, int]:
    """Add back the units that lower the loss most per cost, while one fits."""
    filled, units = dict(kept), {layer.name: layer.num_units for layer in layers}

    def relief(name: str, before: float) -> float:
        removed, more = units[name] - filled[name], {**filled, name: filled[name] + 1}
        return float(losses[name][removed] - losses[name][removed - 1]) / max(cost(more) - before, 1e-12)

    def steepest() -> Iterator[str]:
        while True:
            start, before = dict(filled), cost(filled)
            reliefs = {name: relief(name, before) for name, count in filled.items() if count < units[name]}
            for name in sorted(reliefs, key=reliefs.__getitem__, reverse=True):
                yield name
                if filled != start:
                    break

    fill_units(
        filled,
        steepest(),
        step=lambda name, count: int(count < units[name]),
        fits=lambda choice: cost(choice) <= limit,
    )
    return filled
