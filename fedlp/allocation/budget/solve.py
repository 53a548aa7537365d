r"""Solution of a budget: whole units from a shape over layers.

The sparsity of layer i is :math:`s_i = \operatorname{clip}(\mu + a z_i, 0, 1 - 1/n_i)`: a rule gives the shape z, and
:math:`\mu` is the least that meets the budget, found by bisection as every cost falls with it. At least one unit of
every layer stays, or none (:math:`s_i \le 1`) where its residual branch may go as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, cycle

from fedlp.allocation.budget.filling import fill_units
from fedlp.errors import AllocationError
from fedlp.types import PrunableLayer

Cost = Callable[[Mapping[str, float]], float]  # of the units kept in each layer; rises with each of them

_STEPS = 200  # of a bisection; it ends before, when the interval cannot be halved any more


def solve_budget(
    layers: Sequence[PrunableLayer], shape: Mapping[str, float], amplitude: float, cost: Cost, limit: float
) -> dict[str, float]:
    """Return the sparsity of each layer; the budget is met to rounding error before rounding to whole units.

    Parameters
    ----------
    shape : mapping from layer name to float
        :math:`z_i`; the higher, the more is removed.
    amplitude : float
        :math:`a`, >= 0.
    cost : callable
        Cost of a choice of (fractional) units kept.
    limit : float
        Largest cost.

    Raises
    ------
    AllocationError
        If the shape is not finite, or the limit is below the cost of one unit of every layer; names that cost.
    """
    for layer in layers:
        if not -float("inf") < shape[layer.name] < float("inf"):
            raise AllocationError(f"layer {layer.name}: its score is {shape[layer.name]}; scores must be finite")
    check_reachable(layers, cost, limit)
    ceilings = {layer.name: 1.0 - layer.least / layer.num_units for layer in layers}
    units = {layer.name: layer.num_units for layer in layers}

    def sparsity(mu: float) -> dict[str, float]:
        return {name: min(max(mu + amplitude * shape[name], 0.0), top) for name, top in ceilings.items()}

    def fits(mu: float) -> bool:
        return cost({name: (1.0 - s) * units[name] for name, s in sparsity(mu).items()}) <= limit

    lowest = -amplitude * max(shape.values())
    highest = 1.0 - amplitude * min(shape.values())
    if fits(lowest):
        return sparsity(lowest)
    for _ in range(_STEPS):
        middle = 0.5 * (lowest + highest)
        if middle in (lowest, highest):
            break
        lowest, highest = (lowest, middle) if fits(middle) else (middle, highest)
    return sparsity(highest)


def check_reachable(layers: Sequence[PrunableLayer], cost: Cost, limit: float) -> None:
    """Raise AllocationError if the fewest units of each layer exceed the limit."""
    least = cost({layer.name: float(layer.least) for layer in layers})
    if least > limit:
        units = "one unit" if all(layer.least for layer in layers) else "the fewest units"
        raise AllocationError(
            f"the target of {limit:,.0f} is out of reach: with {units} in each of the {len(layers)} prunable layers "
            f"the model still has {least:,.0f}; choose at least that"
        )


def round_units(
    layers: Sequence[PrunableLayer], sparsity: Mapping[str, float], cost: Cost, limit: float
) -> dict[str, int]:
    """Return the units kept of each layer: rounded down, then one more where the remainder is largest and still fits.

    The result is within one unit of the limit, from below; no layer that still could grow fits one more.
    """
    wanted = {layer.name: (1.0 - sparsity[layer.name]) * layer.num_units for layer in layers}
    units = {layer.name: layer.num_units for layer in layers}
    kept = {layer.name: max(layer.least, int(wanted[layer.name] + 1e-9)) for layer in layers}
    nearest = sorted(layers, key=lambda layer: kept[layer.name] - wanted[layer.name])
    smallest = sorted(layers, key=lambda layer: layer.num_params / layer.num_units)
    order = chain(nearest, cycle(smallest))
    fill_units(
        kept,
        (layer.name for layer in order),
        step=lambda name, count: int(count < units[name]),
        fits=lambda choice: cost(choice) <= limit,
    )
    return kept


def allocate_shape(
    layers: Sequence[PrunableLayer], shape: Mapping[str, float], amplitude: float, cost: Cost, limit: float
) -> dict[str, int]:
    """Return the units kept of each layer for a shape over layers: the higher, the more is removed.

    Raises
    ------
    AllocationError
        As :func:`solve_budget`.
    """
    return round_units(layers, solve_budget(layers, shape, amplitude, cost, limit), cost, limit)
