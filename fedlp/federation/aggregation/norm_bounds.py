r"""Bounds on the norms of updates from the round's medians, where clients hold different parts of the model.

With :math:`\rho_{k,t}` the root mean square of client k's differences over the entries of tensor t that it holds, and
:math:`n_{k,t}` their number, a typical update of the same tensors has the squared norm

.. math:: \nu_k^2 = \sum_t \max\left(n_{k,t} \operatorname{med}_j \rho_{j,t}^2, \,
   \operatorname{med}_j n_{j,t} \rho_{j,t}^2\right),

with medians over the clients that hold a part of t (the lower one of an even number). With
:math:`r_k = \lVert \Delta_k \rVert / \nu_k` an update is scaled by

.. math:: \min(1, \max(c, e^{3 s}) / r_k),
   \qquad s = 1.4826 \operatorname{med}_k | \log r_k - \operatorname{med}_j \log r_j |.

So clients of shallow or drawn parts are compared with what others did to the same tensors. The second median in
:math:`\nu_k` is for slices: a narrow sub-model changes each of its few entries more, and a tensor no more than others
do. :math:`s`, a robust standard deviation, is for rounds in which honest clients differ (in depth, classes, steps): the
bound is then three of it. Fewer than half of the clients make it no larger than 1.4826 times the range of the others'
:math:`\log r`. Tensors that fewer than ``MIN_HOLDERS`` clients hold are not compared, since two hostile clients would
set their median.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.errors import ConfigError

MIN_HOLDERS = 5  # a median of fewer is no bound: of three, one client with another takes it
_DEVIATIONS, _PER_MAD = 3.0, 1.4826  # of a normal distribution's median absolute deviation
_LARGEST_EXPONENT = 700.0
_BLOCK = 1 << 18  # numbers that are widened at a time

_ESTIMATED = 1 << 15  # numbers whose squares are added in float32: their sum is off by less than a thousandth
_LEAST = 1e-25  # of a sum of squares that is no victim of underflow
_MARGIN = 0.98  # of a bound, within which estimates are sure to be

Squares = Mapping[str, tuple[float, int]]
"""Sum of the squared differences of one update, and their number, by tensor."""

StackSquares = Mapping[str, tuple[NDArray[np.float64], int]]
"""Estimated sums of the squared differences of several updates, (clients,), and their number in each, by tensor."""


def squared_norm(values: Tensor, before: Tensor) -> float:
    """Return the sum of squared differences of two tensors of one shape; float64, in the same order on any machine."""
    one, two = _as_array(values), _as_array(before)
    wide = np.empty(min(_BLOCK, len(one)))
    total = 0.0
    for lo in range(0, len(one), _BLOCK):
        left = one[lo : lo + _BLOCK]
        block = np.subtract(left, two[lo : lo + _BLOCK], out=wide[: len(left)], dtype=np.float64)  # one pass, not two
        total += float(np.einsum("i,i->", block, block))  # no BLAS, whose order of sums depends on its threads
    return total


def _as_array(values: Tensor) -> NDArray[np.floating]:
    """Return the numbers of a tensor in a row; of a dtype that NumPy does not have in float32, without rounding."""
    flat = values.detach().reshape(-1)
    found: NDArray[np.floating] = (flat.float() if flat.dtype == torch.bfloat16 else flat).numpy()
    return found


def squared_norms(stack: Tensor, before: Tensor) -> list[float]:
    """Return :func:`squared_norm` of each of several tensors (clients, ...); small ones at once, up to rounding."""
    if before.numel() > _BLOCK:
        return [squared_norm(values, before) for values in stack]
    found: list[float] = []
    old, rows = before.reshape(-1).to(torch.float64), max(1, _BLOCK // before.numel())
    wide = torch.empty(min(rows, len(stack)), len(old), dtype=torch.float64)
    for some in torch.split(stack.reshape(len(stack), -1), rows):
        block = wide[: len(some)].copy_(some).sub_(old).numpy()
        found += np.einsum("ki,ki->k", block, block).tolist()
    return found


def estimate_squares(stack: Tensor, before: Tensor) -> NDArray[np.float64]:
    """Return estimates of :func:`squared_norms`, (clients,), to a thousandth and several times as fast.

    Numbers that float32 cannot square are not finite; small ones, and those of other dtypes, are exact.
    """
    if stack.dtype != torch.float32 or before.dtype != torch.float32:
        return np.array(squared_norms(stack, before))
    rows, old = stack.reshape(len(stack), -1).numpy(), before.reshape(-1).numpy()
    found, wide = np.zeros(len(rows)), np.empty(_ESTIMATED, dtype=np.float32)
    for lo in range(0, len(old), _ESTIMATED):
        part = old[lo : lo + _ESTIMATED]
        at_once = _ESTIMATED // len(part)
        for first in range(0, len(rows), at_once):
            some = rows[first : first + at_once, lo : lo + _ESTIMATED]
            block = wide[: some.size].reshape(some.shape)
            with np.errstate(over="ignore", invalid="ignore"):
                np.subtract(some, part, out=block)
                found[first : first + at_once] += np.einsum("ki,ki->k", block, block)
    return found if bool((found >= _LEAST).all()) else np.array(squared_norms(stack, before))


def are_surely_within(stacks: Sequence[StackSquares], names: Collection[str], multiple: float) -> bool:
    """Return whether :func:`clipping_scales` is 1 for all updates, whatever estimates of their squares hide.

    False where the stacks are of different tensors, which nothing is said about.

    Parameters
    ----------
    names : collection of str
        Tensors whose norms are compared.
    """
    counts = [{name: count for name, (_, count) in stack.items() if name in names} for stack in stacks]
    if not counts or any(count != counts[0] for count in counts):
        return False
    if not counts[0] or sum(len(next(iter(stack.values()))[0]) for stack in stacks) < MIN_HOLDERS:
        return True
    totals = np.stack([np.concatenate([stack[name][0] for stack in stacks]) for name in counts[0]])
    medians = np.sort(totals, axis=1)[:, (totals.shape[1] - 1) // 2]  # of one number of entries, so of means as well
    return bool((totals.sum(axis=0) <= _MARGIN * multiple**2 * medians.sum()).all())


def check_multiples(**bounds: float | None) -> None:
    """Raise ConfigError unless each bound of the aggregator, by its option, is at least 1 and finite, or None."""
    for name, value in bounds.items():
        if value is not None and not 1 <= value < math.inf:
            raise ConfigError(f"aggregator.{name}={value} is not allowed: it must be at least 1, or null")


def lower_median(values: Sequence[float]) -> float:
    """Return the median, of an even number the lower one; at least one value."""
    return sorted(values)[(len(values) - 1) // 2]


def clipping_scales(updates: Sequence[Squares], multiple: float) -> list[float]:
    """Return the factor of each update's differences, in (0, 1].

    Parameters
    ----------
    updates : sequence of Squares
        Of all updates of a round; tensors of at least one entry.
    multiple : float
        Largest norm where clients are alike, as a multiple of a typical update's, >= 1.

    Returns
    -------
    list of float
        Exactly 1 within the bound. Also where most clients changed none of the tensors, so that there is no measure.
    """
    held: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for update in updates:
        for name, found in update.items():
            held[name].append(found)
    typical = {name: _typical(found) for name, found in held.items() if len(found) >= MIN_HOLDERS}
    ratios = [_ratio(update, typical) for update in updates]
    limit = max(multiple**2, _spread(ratios))
    return [math.sqrt(limit / ratio) if ratio > limit else 1.0 for ratio in ratios]


def _typical(found: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Return the median squared difference of an entry of a tensor, and that of all entries that a client holds."""
    return lower_median([total / count for total, count in found]), lower_median([total for total, _ in found])


def _ratio(update: Squares, typical: Mapping[str, tuple[float, float]]) -> float:
    """Return the squared norm of an update, as a multiple of a typical one's; 0 where there is no measure."""
    compared = [name for name in update if name in typical]
    total = math.fsum(update[name][0] for name in compared)
    reference = math.fsum(max(update[name][1] * typical[name][0], typical[name][1]) for name in compared)
    return total / reference if reference else 0.0


def _spread(ratios: Sequence[float]) -> float:
    """Return the factor of three robust standard deviations of the ratios' logarithms; 1 without any."""
    logs = [math.log(ratio) for ratio in ratios if ratio > 0.0]
    if not logs:
        return 1.0
    centre = lower_median(logs)
    deviation = _PER_MAD * lower_median([abs(value - centre) for value in logs])
    return math.exp(min(_DEVIATIONS * deviation, _LARGEST_EXPONENT))
