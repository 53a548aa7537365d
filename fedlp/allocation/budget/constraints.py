r"""From a shape over layers to units that meet every limit of every client's budget.

The sparsity of layer i is :math:`s_i = \operatorname{clip}(\mu + a(S)\, z_i, lo_i, hi_i)`. Every cost falls with
:math:`\mu`, so each limit is met from some least :math:`\mu` on, and the largest of those meets all, one of them
exactly. It is found by bisection on "all limits hold", for all clients at once.

Smaller budgets nest inside larger ones that share shape and amplitude: their :math:`\mu` is larger. An amplitude that
depends on the mean sparsity S is therefore taken at one S for all clients that are solved together, or at ``reference``
where that is given: nesting across calls asks for one shape and one reference. Rounding gives each client all units
that fit, which is worth more than nesting: rounded units need not nest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlp.allocation.budget.costs import COSTS, Array, CostModel, LatencyTable, given_limits
from fedlp.allocation.budget.rounding import Bounds, Box, make_box, refill
from fedlp.errors import AllocationError
from fedlp.types import Budget, PrunableLayer

Amplitude = float | Callable[[float], float]  # of the mean sparsity S in [0, 1]

_POINTS = 31  # at which a bracket is divided at once, over all clients
_HALVINGS = 54
_MARGIN = 1e-9  # of the bracket, so that its ends clip every layer
_EXACT = 1e-12  # what a sum of float64 may be off, relative


@dataclass(frozen=True)
class FleetPlan:
    """What each client keeps.

    Attributes
    ----------
    sparsity : (clients, layers)
        Before rounding; NaN in the rows of refused clients.
    kept : (clients, layers)
        Whole units; 0 in the rows of refused clients.
    refused : mapping from client id to AllocationError
        Clients whose budget cannot be met or means nothing, and why.
    """

    client_ids: tuple[int, ...]
    sparsity: Array
    kept: NDArray[np.int64]
    refused: Mapping[int, AllocationError]


def solve_client(
    layers: Sequence[PrunableLayer],
    shape: Mapping[str, float],
    amplitude: Amplitude,
    costs: CostModel,
    budget: Budget | None,
    *,
    client_id: int = 0,
    table: LatencyTable | None = None,
    bounds: Bounds | None = None,
    reference: float | None = None,
) -> dict[str, float]:
    """Return the sparsity of each layer; the tightest limit is met to rounding error, the others hold.

    Parameters
    ----------
    shape : mapping from layer name to float
        :math:`z_i`; the higher, the more is removed.
    amplitude : float or callable
        :math:`a` >= 0; a function is called with ``reference``, or else with the mean sparsity that uniform pruning
        needs to meet this budget.
    table : LatencyTable or None
        The client's own; else that of ``costs``.

    Raises
    ------
    AllocationError
        If a limit is no number above 0 or below what can be reached, a score is not finite, or a layer has no units;
        names the client and the limit or layer.
    """
    box = make_box(layers, costs, bounds)
    limits = _client_limits(box, costs, budget, client_id, table)[None]
    z = _shape_row(layers, shape, f"client {client_id}: ")[None]
    sparsity = _solve(box, z, _resolve(amplitude, reference, box, costs, limits), costs, limits)
    return dict(zip(costs.layers, sparsity[0].tolist(), strict=True))


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
    """Return the whole units of each layer: all limits hold, and no layer could keep one more; errors as above.

    Parameters
    ----------
    multiple : int
        Layers with at least twice as many units keep a multiple of it, or all units; any count where the bounds or
        the limits leave neither. Then no layer could keep ``multiple`` more.
    """
    box = make_box(layers, costs, bounds, multiple)
    limits = _client_limits(box, costs, budget, client_id, table)[None]
    row = _shape_row(layers, sparsity, f"client {client_id}: ")[None]
    kept = refill(box, (1.0 - row) * box.units, costs, limits)
    return dict(zip(costs.layers, kept[0].tolist(), strict=True))


def solve_fleet(
    layers: Sequence[PrunableLayer],
    shapes: Mapping[str, float] | Sequence[Mapping[str, float]],
    amplitude: Amplitude,
    costs: CostModel,
    budgets: Sequence[Budget | None],
    *,
    client_ids: Sequence[int] | None = None,
    tables: Sequence[LatencyTable | None] | None = None,
    bounds: Bounds | None = None,
    reference: float | None = None,
    multiple: int = 1,
) -> FleetPlan:
    """Return what each client keeps, as :func:`solve_client` and :func:`round_client` find it, all at once.

    Parameters
    ----------
    shapes : mapping, or one per client
        One for all clients makes smaller budgets nest; one per client need not.
    amplitude : float or callable
        A function is called once: with ``reference``, or else with the mean over clients of what uniform pruning needs.
    tables : sequence of LatencyTable or None
        One per client; that of ``costs`` where absent.
    multiple : int
        Of which layers keep a multiple, where that can be; see :func:`round_client`.

    Raises
    ------
    AllocationError
        If a layer has no units, or a shape that all clients share is not finite. What is wrong with one client is in
        ``refused`` instead.
    """
    ids = tuple(client_ids) if client_ids is not None else tuple(range(len(budgets)))
    own = tuple(tables) if tables is not None else (None,) * len(budgets)
    box = make_box(layers, costs, bounds, multiple)
    common = _shape_row(layers, shapes, "") if isinstance(shapes, Mapping) else None
    each = () if isinstance(shapes, Mapping) else shapes
    rows: list[int] = []
    limits, z = np.empty((len(budgets), len(COSTS))), np.zeros((len(budgets), len(layers)))
    refused: dict[int, AllocationError] = {}
    for i, (client_id, budget, table) in enumerate(zip(ids, budgets, own, strict=True)):
        try:
            limits[i] = costs.limits(budget, table)
            z[i] = _shape_row(layers, each[i], "") if common is None else common
        except AllocationError as error:
            refused[client_id] = AllocationError(f"client {client_id}: {error}")
        else:
            rows.append(i)
    least = costs.evaluate(box.least[None])[0]
    for i in [i for i in rows if (least > limits[i] * (1 + _EXACT)).any()]:
        rows.remove(i)
        refused[ids[i]] = _unreachable(ids[i], costs, budgets[i], limits[i], least, own[i], len(layers))
    sparsity, kept = np.full(z.shape, math.nan), np.zeros(z.shape, dtype=np.int64)
    if rows:
        a = _resolve(amplitude, reference, box, costs, limits[rows])
        sparsity[rows] = _solve(box, z[rows], a, costs, limits[rows])
        kept[rows] = refill(box, (1.0 - sparsity[rows]) * box.units, costs, limits[rows])
    return FleetPlan(ids, sparsity, kept, refused)


# --------------------------------------------------------------------------------------------------------------- solver
def _solve(box: Box, z: Array, amplitude: float, costs: CostModel, limits: Array) -> Array:
    """Return the sparsity, (clients, layers), at the least mu that meets all limits; they must be in reach."""
    rise = amplitude * z

    def kept(mu: Array) -> Array:
        return np.clip((1.0 - mu[:, :, None] - rise[:, None, :]) * box.units, box.least, box.most)

    def fits(mu: Array) -> NDArray[np.bool_]:
        return np.all(costs.evaluate(kept(mu)) <= limits[:, None, :], axis=-1)  # type: ignore[no-any-return]

    low = (1.0 - box.most / box.units - rise).min(axis=1) - _MARGIN
    high = (1.0 - box.least / box.units - rise).max(axis=1) + _MARGIN
    high = np.where(fits(low[:, None])[:, 0], low, high)
    points = max(1, _POINTS // len(z))
    fractions = np.arange(points + 2) / (points + 1)
    everyone = np.arange(len(z))
    for _ in range(math.ceil(_HALVINGS / math.log2(points + 1))):
        edges = low[:, None] + (high - low)[:, None] * fractions
        edges[:, -1] = high
        first = points - fits(edges[:, 1:-1]).sum(axis=1)
        low, high = edges[everyone, first], edges[everyone, first + 1]
    return 1.0 - kept(high[:, None])[:, 0] / box.units


def _resolve(amplitude: Amplitude, reference: float | None, box: Box, costs: CostModel, limits: Array) -> float:
    value = amplitude
    if callable(amplitude):
        if reference is None:
            reference = float(_solve(box, np.zeros((len(limits), len(box.units))), 0.0, costs, limits).mean())
        value = amplitude(reference)
    assert not callable(value)
    if not 0 <= value < math.inf:
        raise AllocationError(f"the amplitude is {value}; it must be a finite number of at least 0")
    return value


def _shape_row(layers: Sequence[PrunableLayer], shape: Mapping[str, float], whose: str) -> Array:
    for layer in layers:
        if not math.isfinite(shape.get(layer.name, math.nan)):
            found = shape.get(layer.name, "missing")
            raise AllocationError(f"{whose}layer {layer.name}: its score is {found}; scores must be finite")
    return np.array([shape[layer.name] for layer in layers], dtype=np.float64)


def _client_limits(
    box: Box, costs: CostModel, budget: Budget | None, client_id: int, table: LatencyTable | None
) -> Array:
    try:
        limits = costs.limits(budget, table)
    except AllocationError as error:
        raise AllocationError(f"client {client_id}: {error}") from error
    least = costs.evaluate(box.least[None])[0]
    if (least > limits * (1 + _EXACT)).any():
        raise _unreachable(client_id, costs, budget, limits, least, table, len(box.units))
    return limits


def _unreachable(
    client_id: int,
    costs: CostModel,
    budget: Budget | None,
    limits: Array,
    least: Array,
    table: LatencyTable | None,
    num_layers: int,
) -> AllocationError:
    """Return the error about the first limit that even the fewest units break."""
    table = table or costs.latency
    for name, value in given_limits(budget):
        reached = least[COSTS.index("macs")] if name == "latency_s" else least[COSTS.index(name)]
        if name == "latency_s" and table is not None:
            reached = table.time(float(reached))
        if reached > value * (1 + _EXACT):
            break
    return AllocationError(
        f"client {client_id}: its budget of {name}={value:,.10g} is out of reach: with the fewest units in each of the "
        f"{num_layers} prunable layers it still is {reached:,.10g}; choose at least that"
    )
