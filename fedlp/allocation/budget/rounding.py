"""Rounding of fractional units to whole ones, in multiples for hardware.

With a multiple, a layer keeps a multiple of it, or all its units; any count if its bounds or the
limits leave neither, or if it has fewer than two multiples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle

import numpy as np

from fedlp.allocation.budget.filling import Kept, fill_units
from fedlp.errors import AllocationError
from fedlp.types import PrunableLayer

Bounds = Mapping[str, tuple[float, float]]  # least and highest sparsity; from 0 to all units but the fewest if absent


@dataclass(frozen=True, slots=True)
class Range:
    """Range of units that one layer may keep.

    Attributes
    ----------
    units, least, most : int
        All units, the fewest and the most that may stay.
    multiple : int
        Divisor of a partial number of units; 1 for any count.
    price : float
        Parameters of one unit.
    """

    units: int
    least: int
    most: int
    multiple: int
    price: float

    def step(self, count: int) -> int:
        """Return the step from a number of units to the next multiple, or to all units; 0 if neither may stay."""
        after = (count // self.multiple + 1) * self.multiple
        if after > self.most:
            after = self.units if self.most == self.units else count
        return after - count

    def floor(self, wanted: float) -> int:
        """Return the most units in range that do not exceed the wanted number: a multiple, or all, if possible."""
        count = min(max(math.floor(wanted), self.least), self.most)
        lower = count // self.multiple * self.multiple
        return lower if lower >= max(self.least, min(1, count)) and count < self.units else count


def make_ranges(layers: Sequence[PrunableLayer], bounds: Bounds | None = None, multiple: int = 1) -> dict[str, Range]:
    """Return the range of units of each layer, by layer name."""
    if multiple < 1:
        raise AllocationError(f"units are to be kept in multiples of {multiple}; choose a whole number of at least 1")
    found = {}
    for layer in layers:
        units = layer.num_units
        if units < 1:
            raise AllocationError(f"layer {layer.name} has {units} units; it needs at least one")
        low, high = (bounds or {}).get(layer.name, (0.0, 1.0))
        if not 0 <= low <= high <= 1:
            raise AllocationError(f"layer {layer.name} may be pruned from {low} to {high}; give 0 <= low <= high <= 1")
        most = max(layer.least, math.floor((1.0 - low) * units + 1e-9))
        least = min(most, max(layer.least, math.ceil((1.0 - high) * units - 1e-9)))
        has_one = most == units or most // multiple * multiple >= least
        own = multiple if units >= 2 * multiple and has_one else 1
        found[layer.name] = Range(units, least, most, own, layer.num_params / units)
    return found


def round_to_fit(ranges: Mapping[str, Range], wanted: Mapping[str, float], fits: Callable[[Kept], bool]) -> Kept:
    """Return whole units: the wanted number rounded down, then one step more where it fits.

    A step leads to the layer's next multiple, or to all its units. Layers that are below their first multiple go first,
    then those closest to their next one; the rest goes to the cheapest units, one step of each layer at a
    time. Last, layers that did not reach a multiple take single units. A step that does not fit never will, as costs
    only rise, so that in the end no layer could keep one more. Ties go by the layers' names, so that their order does
    not matter.

    Parameters
    ----------
    wanted : mapping from layer name to float
        Fractional units, within the limits after rounding down.
    """
    kept = {name: layer.floor(wanted[name]) for name, layer in ranges.items()}
    _grow(ranges, kept, wanted, fits)
    astray = {name for name, count in kept.items() if count % ranges[name].multiple and count < ranges[name].units}
    if astray:
        single = {name: replace(layer, multiple=1) if name in astray else layer for name, layer in ranges.items()}
        _grow(single, kept, wanted, fits)
    return kept


def _grow(ranges: Mapping[str, Range], kept: Kept, wanted: Mapping[str, float], fits: Callable[[Kept], bool]) -> None:
    """Add steps to the units kept, in place, until none fits."""

    def missing(name: str) -> tuple[bool, float, str]:
        count, layer = kept[name], ranges[name]
        return count % layer.multiple == 0, layer.step(count) - float(np.round(wanted[name] - count, 9)), name

    first = sorted(kept, key=missing)
    cheapest = sorted(kept, key=lambda name: (ranges[name].price, name))
    fill_units(kept, chain(first, cycle(cheapest)), lambda name, count: ranges[name].step(count), fits)
