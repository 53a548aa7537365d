"""Which entries of a tensor an update covers, and how much weight lies behind each entry.

A choice of indices is one Keep per dimension: a product of runs, so a union of rectangles. Everything here follows
from the runs; no mask of a tensor's own size is made while updates come in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from fedlp.types import Keep

Keeps = tuple[Keep, ...]
Choice = Keeps | None  # None: the whole tensor

_MIN_RECTANGLE = 4096  # numbers: where rectangles are smaller on average, adding the whole tensor is faster


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Rows ``[start, stop)`` of the global tensor, which an update has from its row ``local`` on.

    Attributes
    ----------
    into, of : tuple of slice
        The same for the axes behind the rows, in the global tensor and in the update's; uncut last axes are left out.
    """

    start: int
    stop: int
    local: int
    into: tuple[slice, ...]
    of: tuple[slice, ...]


def rectangles(choice: Choice, num_rows: int) -> list[Rectangle]:
    """Return the rectangles of a choice, disjoint, in the order of their indices."""
    if choice is None:
        return [Rectangle(0, num_rows, 0, (), ())]
    last_cut = max(axis for axis, keep in enumerate(choice) if not keep.is_full)
    rows, *others = [_local_runs(keep) for keep in choice[: last_cut + 1]]
    return [
        Rectangle(*row, tuple(slice(a, b) for a, b, _ in runs), tuple(slice(i, i + b - a) for a, b, i in runs))
        for row, *runs in product(rows, *others)
    ]


def _local_runs(keep: Keep) -> list[tuple[int, int, int]]:
    """Return the runs of an axis with the index, among the kept, at which each begins."""
    found, local = [], 0
    for start, stop in keep.runs:
        found.append((start, stop, local))
        local += stop - start
    return found


def is_scattered(choice: Keeps) -> bool:
    """Whether a choice falls into many rectangles that are too small to be worth a slice each."""
    count = math.prod(len(keep.runs) for keep in choice)
    return count > 4 and math.prod(keep.count for keep in choice) < count * _MIN_RECTANGLE


def widen(values: Tensor, choice: Keeps) -> Tensor:
    """Return ``values`` on the whole tensor, with -0.0 (which changes no sum) where the choice has no index."""
    for axis, keep in enumerate(choice):
        if not keep.is_full:
            shape = (*values.shape[:axis], keep.size, *values.shape[axis + 1 :])
            wide = torch.full(shape, -0.0, dtype=values.dtype)
            values = wide.index_copy_(axis, torch.from_numpy(keep.indices()), values)
    return values


class Denominator:
    """The total weight behind every entry of a tensor, from the total weight of every choice.

    It is the product (weighted row indicators)^T (indicators of the other axes), whose rank is the number of choices;
    exact for whole weights that sum to less than 2^53. Axes that no choice cuts have length 1.

    Parameters
    ----------
    weights : mapping from choice to float
        At least one.
    shape : torch.Size
        The global tensor's; at least one axis.
    """

    def __init__(self, weights: Mapping[Choice, float], shape: torch.Size) -> None:
        rows, *others = [_indicators([choice and choice[axis] for choice in weights], n) for axis, n in enumerate(shape)]
        self._rows = rows * torch.tensor(list(weights.values()), dtype=torch.float64)[:, None]
        self._others = torch.ones(len(weights), 1, dtype=torch.float64)
        for other in others:
            self._others = (self._others[:, :, None] * other[:, None, :]).flatten(1)
        self._shape = [other.shape[1] for other in others]

    def rows(self, lo: int, hi: int) -> Tensor:
        """Return the weights behind the rows ``[lo, hi)``, in a shape that broadcasts to theirs."""
        rows = self._rows if self._rows.shape[1] == 1 else self._rows[:, lo:hi]
        return (rows.T @ self._others).view(-1, *self._shape)


def _indicators(keeps: Sequence[Keep | None], size: int) -> Tensor:
    """Return which indices each choice has: (choices, size) of 0 and 1, or (choices, 1) of 1 if none is cut."""
    if all(keep is None or keep.is_full for keep in keeps):
        return torch.ones(len(keeps), 1, dtype=torch.float64)
    found = np.zeros((len(keeps), size))
    for row, keep in zip(found, keeps, strict=True):
        for start, stop in ((0, size),) if keep is None else keep.runs:
            row[start:stop] = 1.0
    return torch.from_numpy(found)
