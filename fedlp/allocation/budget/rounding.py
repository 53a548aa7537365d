"""From fractional units to whole ones that meet every limit, for many clients at once.

Hardware may like widths that are a multiple of some number. Where one is asked for, a layer keeps a multiple of it, or
all its units; any count where its bounds or the limits leave neither, or where it has fewer than two multiples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlp.allocation.budget.costs import Array, CostModel
from fedlp.errors import AllocationError
from fedlp.types import PrunableLayer

Flags = NDArray[np.bool_]
Bounds = Mapping[str, tuple[float, float]]  # least and highest sparsity; from 0 to all units but one where absent

_CLEARLY = 1 + 1e-12  # beyond what a sum of float64 may be off


@dataclass(frozen=True)
class Box:
    """What each layer may keep; all of shape (layers,).

    Attributes
    ----------
    units, least, most : float
        Whole numbers: units that there are, that stay in any case, and that may stay.
    multiples : float
        Whole numbers, of which a layer keeps a multiple if it does not keep all units; 1 where any count will do.
    ranks : int
        By which ties are broken: that of the layer's name, so that the order of layers does not matter.
    prices : float
        Parameters of one unit.
    """

    units: Array
    least: Array
    most: Array
    multiples: Array
    ranks: NDArray[np.int64]
    prices: Array


def make_box(layers: Sequence[PrunableLayer], costs: CostModel, bounds: Bounds | None = None, multiple: int = 1) -> Box:
    """Return how many units each layer has, must keep and may keep, and of which multiple."""
    if multiple < 1:
        raise AllocationError(f"units are to be kept in multiples of {multiple}; choose a whole number of at least 1")
    names = tuple(layer.name for layer in layers)
    if names != costs.layers:
        raise AllocationError(f"the costs are those of layers {', '.join(costs.layers)}, not of {', '.join(names)}")
    for layer in layers:
        if layer.num_units < 1:
            raise AllocationError(f"layer {layer.name} has {layer.num_units} units; it needs at least one")
        low, high = (bounds or {}).get(layer.name, (0.0, 1.0))
        if not 0 <= low <= high <= 1:
            raise AllocationError(f"layer {layer.name} may be pruned from {low} to {high}; give 0 <= low <= high <= 1")
    units = np.array([layer.num_units for layer in layers], dtype=np.float64)
    low, high = np.array([(bounds or {}).get(name, (0.0, 1.0)) for name in names]).T
    most = np.maximum(1.0, np.floor((1.0 - low) * units + 1e-9))
    least = np.minimum(most, np.maximum(1.0, np.ceil((1.0 - high) * units - 1e-9)))
    has_one = (most == units) | (most // multiple * multiple >= least)
    multiples = np.where((units >= 2 * multiple) & has_one, float(multiple), 1.0)
    ranks = np.argsort(np.argsort(np.array(names)))
    prices = np.array([layer.num_params / layer.num_units for layer in layers])
    return Box(units, least, most, multiples, ranks, prices)


def refill(box: Box, wanted: Array, costs: CostModel, limits: Array) -> NDArray[np.int64]:
    """Return whole units, (clients, layers): those wanted rounded down, then one step more wherever that fits.

    A step leads to the layer's next multiple, or to all its units. Layers that are below their first multiple go first,
    then those that lack least of their next one; what is left goes to the cheapest units, one step of each layer at a
    time. Last, layers that did not reach a multiple take single units. A step that does not fit never will, as costs
    only rise, so that in the end no layer could keep one more.

    Parameters
    ----------
    wanted : (clients, layers)
        Fractional units whose costs, rounded down, are within the limits.
    limits : (clients, costs)
    """
    kept = np.clip(np.floor(wanted), box.least, box.most)
    multiples = np.broadcast_to(box.multiples, kept.shape)
    lower = kept // multiples * multiples
    kept = np.where((lower >= box.least) & (kept < box.units), lower, kept)
    _grow(box, kept, wanted, multiples, costs, limits)
    astray = (kept % multiples > 0) & (kept < box.units)
    if astray.any():
        _grow(box, kept, wanted, np.where(astray, 1.0, multiples), costs, limits)
    return kept.astype(np.int64)


def _grow(box: Box, kept: Array, wanted: Array, multiples: Array, costs: CostModel, limits: Array) -> None:
    """Add steps to the units kept, in place, until none fits."""
    steps = _steps(box, kept, multiples)
    missing = steps - np.round(wanted - kept, 9)
    on_multiple = kept % multiples == 0
    order = np.lexsort((np.broadcast_to(box.ranks, kept.shape), missing, on_multiple), axis=1)
    cheapest = np.broadcast_to(np.lexsort((box.ranks, box.prices)), kept.shape)
    may_grow = steps > 0
    while may_grow.any():
        _grow_each_once(kept, steps, may_grow, order, costs, limits)
        steps = _steps(box, kept, multiples)
        may_grow &= steps > 0
        order = cheapest


def _steps(box: Box, kept: Array, multiples: Array) -> Array:
    """Return how far it is to each layer's next multiple, or to all its units; 0 where neither may be kept."""
    after = (kept // multiples + 1) * multiples
    last = np.where(box.most == box.units, box.units, kept)
    return np.where(after <= box.most, after, last) - kept


def _grow_each_once(
    kept: Array, steps: Array, may_grow: Flags, order: NDArray[np.int64], costs: CostModel, limits: Array
) -> None:
    """Add one step to each layer that may grow, in order, where it fits; clear ``may_grow`` where it does not."""
    pending = may_grow.copy()
    while True:
        rows = np.flatnonzero(pending.any(axis=1))
        if not len(rows):
            return
        fitting = (costs.grown(kept[rows], steps[rows]) <= limits[rows, :, None] * _CLEARLY).all(axis=1)
        may_grow[rows] &= fitting | ~pending[rows]
        pending[rows] &= fitting
        rows = rows[pending[rows].any(axis=1)]
        if not len(rows):
            continue
        waiting, sequence = pending[rows], order[rows]
        places = np.empty(waiting.shape, dtype=np.int64)
        counted = np.cumsum(np.take_along_axis(waiting, sequence, axis=1), axis=1)
        np.put_along_axis(places, sequence, counted, axis=1)
        count = _longest_prefix(kept[rows], steps[rows], waiting, places, costs, limits[rows])[:, None]
        grown = waiting & (places <= count)
        kept[rows] += steps[rows] * grown
        refused = waiting & (places == count + 1)
        may_grow[rows] &= ~refused
        pending[rows] = waiting & ~grown & ~refused


def _longest_prefix(
    kept: Array, steps: Array, waiting: Flags, places: NDArray[np.int64], costs: CostModel, limits: Array
) -> NDArray[np.int64]:
    """Return how many of the waiting layers, by their places from 1 on, can grow together; (clients,)."""
    low, high = np.zeros(len(kept), dtype=np.int64), waiting.sum(axis=1)
    while (low < high).any():
        middle = (low + high + 1) // 2
        trial = kept + steps * (waiting & (places <= middle[:, None]))
        fits = (costs.evaluate(trial) <= limits).all(axis=1)
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low
