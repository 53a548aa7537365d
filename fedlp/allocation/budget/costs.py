"""Costs of kept units under every constraint of a client, for many choices at once.

Parameters, MACs, training memory and uploads are polynomials in the units kept with coefficients >= 0, so that each
rises with every unit; what goes with the last unit of an axis counts with the axis's presence, the smaller of its units
and 1. Seconds are a rising function of MACs measured on the device: a limit on them is one on MACs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from fedlp.errors import AllocationError
from fedlp.types import Budget, PrunableLayer, presence

Array = NDArray[np.float64]
Terms = Mapping[tuple[str, ...], float]  # coefficient of the product of units or presences of axes; () is constant

COSTS = ("params", "macs", "memory_bytes", "upload_bytes")  # columns of every array of costs and limits
_MACS = COSTS.index("macs")
_BYTES = 4.0  # of a float32
_COPIES = {"sgd": 2.0, "momentum": 3.0, "adam": 4.0}  # weights, gradients and what the optimizer keeps
_CHUNK = 2**18  # monomials held at once; purely a memory optimisation


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one device as a function of MACs: linear between measured points, never falling.

    Fewer MACs than the first point take as long as it; beyond the last, seconds are proportional to MACs.

    Attributes
    ----------
    macs : tuple of float
        Of the whole model's units cut uniformly, rising.
    seconds : tuple of float
        Measured at each; a point that is faster than a smaller one counts as slow as that.
    """

    macs: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        values = np.array([*self.macs, *self.seconds])
        rising = bool(np.all(np.diff(self.macs) > 0))
        if not self.macs or len(self.macs) != len(self.seconds) or not rising or not np.all(values > 0):
            raise AllocationError(
                f"a latency table needs a time above 0 for each of its rising MACs, not {self.seconds} for {self.macs}"
            )
        if not np.isfinite(values).all():
            raise AllocationError(f"a latency table needs finite numbers, not {self.seconds} for {self.macs}")
        object.__setattr__(self, "seconds", tuple(np.maximum.accumulate(self.seconds).tolist()))

    def time(self, macs: float) -> float:
        """Return the seconds for a number of MACs."""
        if macs > self.macs[-1]:
            return self.seconds[-1] * (macs / self.macs[-1])
        return float(np.interp(macs, self.macs, self.seconds))

    def most_macs(self, seconds: float) -> float:
        """Return the most MACs within a number of seconds; 0 if the fewest take longer."""
        if seconds < self.seconds[0]:
            return 0.0
        last = int(np.searchsorted(self.seconds, seconds, side="right")) - 1
        if last == len(self.macs) - 1:
            found = self.macs[-1] * (seconds / self.seconds[-1])
        else:
            (left, right), (fast, slow) = self.macs[last : last + 2], self.seconds[last : last + 2]
            found = left + (right - left) * ((seconds - fast) / (slow - fast))
        while self.time(found) > seconds:  # by rounding error
            found = math.nextafter(found, 0.0)
        return found


@dataclass(frozen=True)
class CostModel:
    """Costs of a model's prunable layers.

    Attributes
    ----------
    layers : tuple of str
        Their names, in the order of the last axis of units.
    factors : (terms, degree)
        Indices of the layers whose units each term multiplies; ``len(layers)`` stands for 1, and is last, ``len(layers)
        + 1 + i`` for the presence of layer i. Terms of more layers come first.
    coefficients : (len(COSTS), terms)
    latency : LatencyTable or None
        Of clients that have none of their own.
    """

    layers: tuple[str, ...]
    factors: NDArray[np.int64]
    coefficients: Array
    latency: LatencyTable | None = None
    _degrees: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    _has_presences: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_degrees", (self.factors != len(self.layers)).sum(axis=0))
        object.__setattr__(self, "_has_presences", bool((self.factors > len(self.layers)).any()))

    def evaluate(self, kept: Array) -> Array:
        """Return the costs, (..., len(COSTS)), of (fractional) units kept, (..., layers)."""
        rows = kept.reshape(-1, len(self.layers))
        step = max(1, _CHUNK // len(self.factors))
        parts = [self._monomials(rows[i : i + step]) @ self.coefficients.T for i in range(0, len(rows), step)]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return found.reshape(*kept.shape[:-1], len(COSTS))

    def limits(self, budget: Budget | None, table: LatencyTable | None = None) -> Array:
        """Return the limit on each cost, (len(COSTS),); infinity for no limit.

        Raises
        ------
        AllocationError
            If a limit is not a number above 0, or seconds are limited and there is no table.
        """
        found = np.full(len(COSTS), math.inf)
        for name, value in given_limits(budget):
            if not value > 0 or math.isinf(value):
                raise AllocationError(f"its budget has {name}={value}; a limit must be a finite number above 0")
            if name != "latency_s":
                column = COSTS.index(name)
                found[column] = min(found[column], value)
                continue
            table = table or self.latency
            if table is None:
                raise AllocationError(f"its budget has latency_s={value}, but nothing was measured on its device")
            found[_MACS] = min(found[_MACS], table.most_macs(value))
        return found

    def _monomials(self, kept: Array) -> Array:
        extended = np.concatenate([kept, np.ones((len(kept), 1))], axis=1)
        if self._has_presences:
            extended = np.concatenate([extended, np.minimum(kept, 1.0)], axis=1)
        found = extended.take(self.factors[:, 0], axis=1)
        for column, count in zip(self.factors.T[1:], self._degrees[1:], strict=True):
            found[:, :count] *= extended.take(column[:count], axis=1)
        return found


def given_limits(budget: Budget | None) -> list[tuple[str, float]]:
    """Return name and value of each limit of a budget."""
    if budget is None:
        return []
    values = [(item.name, getattr(budget, item.name)) for item in fields(budget)]
    return [(name, value) for name, value in values if value is not None]


def make_costs(
    layers: Sequence[PrunableLayer],
    params: Terms,
    macs: Terms,
    activation_bytes: Terms,
    batch_size: int,
    optimizer: str,
    upload_bytes: Terms | None = None,
    upload_overhead: float = 0.0,
    latency: LatencyTable | None = None,
    trained: Terms | None = None,
    received: int = 0,
    held_bytes: Terms | None = None,
) -> CostModel:
    """Return the costs of a model from its footprints.

    Training memory is float32 weights, gradients and optimizer state, and a batch of activations; an upload is all
    parameters kept.

    Parameters
    ----------
    params, macs, activation_bytes : Terms
        Of the whole model over the layers' axes; MACs and activations are per example.
    optimizer : "sgd", "momentum" or "adam"
    upload_bytes : Terms, optional
        Encoded bytes of the parameters; four bytes each if absent.
    upload_overhead : float
        Bytes of a message beside the parameters.
    trained : Terms, optional
        Parameters with gradients and optimizer state; all if absent.
    received : int
        Further copies of all parameters: the message that a client holds during training.
    held_bytes : Terms, optional
        Bytes of weights and received message where they are not four of each parameter; with ``trained``.
    """
    weight_bytes = _BYTES * _COPIES[optimizer]
    sources: tuple[list[tuple[float, Terms]], ...] = (
        [(1.0, params)],
        [(1.0, macs)],
        [
            (received * _BYTES + (_BYTES if trained is not None else weight_bytes), params)
            if held_bytes is None
            else (1.0, held_bytes),
            (weight_bytes - _BYTES, trained or {}),
            (float(batch_size), activation_bytes),
        ],
        [(_BYTES, params) if upload_bytes is None else (1.0, upload_bytes), (upload_overhead, {(): 1.0})],
    )
    names = tuple(layer.name for layer in layers)
    index = {name: i for i, name in enumerate(names)}
    index |= {presence(name): len(names) + 1 + i for i, name in enumerate(names)}
    keys = {key for source in sources for _, terms in source for key in terms}
    for axis in sorted({axis for key in keys for axis in key} - index.keys()):
        raise AllocationError(f"the costs name {axis}, which is not one of the {len(names)} prunable layers")
    ordered = sorted(keys | {()}, key=lambda key: (-len(key), key))
    degree = max(1, len(ordered[0]))
    factors = np.full((len(ordered), degree), len(names), dtype=np.int64)
    for row, key in enumerate(ordered):
        factors[row, : len(key)] = [index[axis] for axis in key]
    coefficients = np.array(
        [[sum(times * terms.get(key, 0.0) for times, terms in source) for key in ordered] for source in sources]
    )
    falling = np.argwhere((coefficients < 0) & (factors[:, 0] != len(names)))
    for cost, row in falling[:1]:
        raise AllocationError(f"{COSTS[cost]} would fall as {' and '.join(ordered[row])} grow; costs must rise")
    return CostModel(names, factors, coefficients, latency)
