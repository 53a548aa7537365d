r"""Bounds on the norms of updates from the round's medians, where clients hold different parts of the model.

With :math:`\rho_{k,t}` the root mean square of client k's differences over the entries of tensor t that it holds, and
:math:`n_{k,t}` their number, a typical update of the same entries has the squared norm

.. math:: \nu_k^2 = \sum_t n_{k,t} \, \operatorname{med}_j \rho_{j,t}^2,

with medians over the clients that hold a part of t (the lower one of an even number). An update is scaled by
:math:`\min(1, c \, \nu_k / \lVert \Delta_k \rVert)`. So clients of narrow, shallow or drawn parts are compared with
what others did to the same tensors. Tensors that fewer than ``MIN_HOLDERS`` clients hold are not compared, since two
hostile clients would set their median.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

MIN_HOLDERS = 5  # a median of fewer is no bound: of three, one client with another takes it
_BLOCK = 1 << 18  # numbers that are widened at a time

Squares = Mapping[str, tuple[float, int]]
"""Sum of the squared differences of one update, and their number, by tensor."""


def squared_norm(values: Tensor, before: Tensor) -> float:
    """Return the sum of squared differences of two tensors of one shape; float64, in the same order on any machine."""
    one, two = values.reshape(-1), before.reshape(-1)
    wide = torch.empty(min(_BLOCK, one.numel()), dtype=torch.float64)
    total = 0.0
    for left, right in zip(torch.split(one, _BLOCK), torch.split(two, _BLOCK), strict=True):
        block = wide[: left.numel()].copy_(left).sub_(right).numpy()
        total += float(np.einsum("i,i->", block, block))  # no BLAS, whose order of sums depends on its threads
    return total


def squared_norms(stack: Tensor, before: Tensor) -> list[float]:
    """Return :func:`squared_norm` of each of several tensors (clients, ...); small ones at once, up to rounding."""
    if before.numel() > _BLOCK:
        return [squared_norm(values, before) for values in stack]
    found: list[float] = []
    for some in torch.split(stack.reshape(len(stack), -1), max(1, _BLOCK // before.numel())):
        wide = torch.sub(some.to(torch.float64), before.reshape(-1).to(torch.float64)).numpy()
        found += np.einsum("ki,ki->k", wide, wide).tolist()
    return found


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
        Largest norm, as a multiple of a typical update's, >= 1.

    Returns
    -------
    list of float
        Exactly 1 within the bound. Also where most clients changed none of the tensors, so that there is no measure.
    """
    means: dict[str, list[float]] = defaultdict(list)
    for update in updates:
        for name, (total, count) in update.items():
            means[name].append(total / count)
    typical = {name: lower_median(found) for name, found in means.items() if len(found) >= MIN_HOLDERS}
    return [_scale(update, typical, multiple) for update in updates]


def _scale(update: Squares, typical: Mapping[str, float], multiple: float) -> float:
    compared = [name for name in update if name in typical]
    total = math.fsum(update[name][0] for name in compared)
    reference = math.fsum(update[name][1] * typical[name] for name in compared)
    if not reference or total <= multiple**2 * reference:
        return 1.0
    return multiple * math.sqrt(reference / total)
