"""Greedy filling: units are added back to layers, one step at a time, while they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Kept = dict[str, int]  # units kept, by layer name


def fill_units(kept: Kept, order: Iterable[str], step: Callable[[str, int], int], fits: Callable[[Kept], bool]) -> None:
    """Grow layers in place until none can grow.

    Costs must rise with the units of every layer: a step that does not fit never will, so the layer is not tried
    again.

    Parameters
    ----------
    kept : dict
        Units kept of each layer.
    order : iterable of str
        Layers to try, in turn, with repetitions. May be endless, and may depend on
        ``kept`` as it grows.
    step : callable
        Returns the size of the next step of a layer from a number of units; 0 if there is none.
    fits : callable
        Returns whether a choice of units is within the limits.
    """
    growing = {name for name, count in kept.items() if step(name, count)}
    if not growing:
        return
    for name in order:
        if name not in growing:
            continue
        grown = {**kept, name: kept[name] + step(name, kept[name])}
        has_grown = fits(grown)
        if has_grown:
            kept[name] = grown[name]
        if not (has_grown and step(name, kept[name])):
            growing.discard(name)
        if not growing:
            return
