"""Whole units of each layer that meet every limit of a client's budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedlp.allocation.budget.costs import COSTS, Array, CostModel, LatencyTable, given_limits
from fedlp.allocation.budget.filling import Kept
from fedlp.allocation.budget.rounding import Bounds, Range, make_ranges, round_to_fit
from fedlp.errors import AllocationError
from fedlp.types import Budget, PrunableLayer

_EXACT = 1e-12  # what a sum of float64 may be off, relative


def round_client(
    layers: Sequence[PrunableLayer],
    sparsity: Mapping[str, float],
    costs: CostModel,
    budget: Budget | None,
    *,
    client_id: int = 0,
    table: LatencyTable | None = None,
    bounds: Bounds | None = None,
    multiple: int = 1,
) -> dict[str, int]:
    """Return the whole units of each layer: all limits hold, and no layer could keep one more.

    Parameters
    ----------
    sparsity : mapping from layer name to float
        Its fractional units meet the limits when they are rounded down.
    table : LatencyTable or None
        The client's own; else that of ``costs``.
    bounds : mapping from layer name to (float, float), optional
        Least and highest sparsity of a layer.
    multiple : int
        Layers with at least twice as many units keep a multiple of it, or all units; any count where the bounds or
        the limits leave neither. Then no layer could keep ``multiple`` more.

    Raises
    ------
    AllocationError
        If a limit is not positive or out of reach, a sparsity is not finite, or a layer has no units;
        names the client and the limit or layer.
    """
    ranges = make_ranges(layers, bounds, multiple)
    if tuple(ranges) != costs.layers:
        raise AllocationError(f"the costs are those of layers {', '.join(costs.layers)}, not of {', '.join(ranges)}")
    limits = _client_limits(ranges, costs, budget, client_id, table)
    for name in ranges:
        if not math.isfinite(sparsity.get(name, math.nan)):
            found = sparsity.get(name, "missing")
            raise AllocationError(f"client {client_id}: layer {name}: its sparsity is {found}; it must be finite")

    def fits(kept: Kept) -> bool:
        return bool((costs.evaluate(_row(kept))[0] <= limits).all())

    return round_to_fit(ranges, {name: (1.0 - sparsity[name]) * layer.units for name, layer in ranges.items()}, fits)


def _row(kept: Mapping[str, int]) -> Array:
    return np.array([list(kept.values())], dtype=np.float64)


def _client_limits(
    ranges: Mapping[str, Range], costs: CostModel, budget: Budget | None, client_id: int, table: LatencyTable | None
) -> Array:
    """Return the limit on each cost, (len(COSTS),); AllocationError if the fewest units exceed one."""
    try:
        limits = costs.limits(budget, table)
    except AllocationError as error:
        raise AllocationError(f"client {client_id}: {error}") from error
    least = costs.evaluate(_row({name: layer.least for name, layer in ranges.items()}))[0]
    if (least > limits * (1 + _EXACT)).any():
        raise _unreachable(client_id, costs, budget, ranges, table)
    return limits


def _unreachable(
    client_id: int, costs: CostModel, budget: Budget | None, ranges: Mapping[str, Range], table: LatencyTable | None
) -> AllocationError:
    """Return the error of the first limit that the fewest units exceed, beside the costs of all units and of none."""
    units = [[layer.least, layer.units, 0] for layer in ranges.values()]
    found = costs.evaluate(np.array(units, dtype=np.float64).T)
    table = table or costs.latency
    for name, value in given_limits(budget):
        least, whole, fixed = map(float, found[:, COSTS.index("macs" if name == "latency_s" else name)])
        reached = table.time(least) if name == "latency_s" and table is not None else least
        if reached > value * (1 + _EXACT):
            break
    share = f"{math.ceil(100 * least / whole)} % of the whole model's"
    if name != "latency_s":
        share += f", of which parts that are never cut, such as embeddings, take {fixed:,.10g}"
    return AllocationError(
        f"client {client_id}: its budget of {name}={value:,.10g} is out of reach: with the fewest units in each of the "
        f"{len(ranges)} prunable layers it still is {reached:,.10g}; choose at least that ({share})"
    )
