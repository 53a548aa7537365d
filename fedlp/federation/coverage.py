"""Which entries of a tensor an update covers, and how much weight lies behind each entry.

A choice of indices is one Keep per dimension: a product of runs, so a union of rectangles. No mask of a tensor's own
size is made while updates come in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.types import Keep

Keeps = tuple[Keep, ...]
Choice = Keeps | None  # None: the whole tensor

_MIN_RECTANGLE = 4096  # numbers: below this on average, one step over the whole tensor beats a step per rectangle
_Run = tuple[int, int, int]  # start, stop, and how many kept indices lie before


class Whole:
    """The region of an update that has the whole tensor."""

    def pieces(self, values: Tensor, total: Tensor, lo: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views of ``total`` with what to add to them.

        Parameters
        ----------
        values : Tensor
            The update's tensor.
        total : Tensor
            The rows of the global tensor from ``lo`` on, as many as it has.
        """
        yield total, values[lo : lo + len(total)]


class Slices(Whole):
    """A region of few rectangles, each of which is a view."""

    def __init__(self, choice: Keeps) -> None:
        last_cut = max(axis for axis, keep in enumerate(choice) if not keep.is_full)
        rows, *others = [_runs(keep) for keep in choice[: last_cut + 1]]
        self._rectangles = [
            (row, tuple(slice(a, b) for a, b, _ in other), tuple(slice(i, i + b - a) for a, b, i in other))
            for row, *other in product(rows, *others)
        ]

    def pieces(self, values: Tensor, total: Tensor, lo: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the part of every rectangle that lies in ``total``."""
        for (start, stop, before), into, of in self._rectangles:
            top, end = max(start, lo), min(stop, lo + len(total))
            if top < end:
                shift = before - start
                yield total[(slice(top - lo, end - lo), *into)], values[(slice(top + shift, end + shift), *of)]


class Scatter(Whole):
    """A region of many small rectangles: values are laid out on all of ``total``, with -0.0, which changes no sum."""

    def __init__(self, choice: Keeps) -> None:
        self._indices = [None if keep.is_full else keep.indices() for keep in choice]

    def pieces(self, values: Tensor, total: Tensor, lo: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all of ``total``."""
        rows, *others = self._indices
        if rows is None:
            values = values[lo : lo + len(total)]
        else:
            first, last = np.searchsorted(rows, (lo, lo + len(total)))
            values = values[first:last]
        for axis in range(total.ndim - 1, 0, -1):
            values = _spread(values, axis, others[axis - 1], total.shape[axis])
        yield total, values if rows is None else _spread(values, 0, rows[first:last] - lo, len(total))


@lru_cache(maxsize=4096)
def region(choice: Choice) -> Whole:
    """Return the region of a choice of indices."""
    if choice is None:
        return Whole()
    count = math.prod(len(keep.runs) for keep in choice)
    is_scattered = count > 4 and math.prod(keep.count for keep in choice) < count * _MIN_RECTANGLE
    return Scatter(choice) if is_scattered else Slices(choice)


def _runs(keep: Keep) -> list[_Run]:
    found, before = [], 0
    for start, stop in keep.runs:
        found.append((start, stop, before))
        before += stop - start
    return found


def _spread(values: Tensor, axis: int, indices: NDArray[np.int64] | None, size: int) -> Tensor:
    """Return ``values`` at some indices of an axis of length ``size``, -0.0 elsewhere."""
    if indices is None:
        return values
    shape = (*values.shape[:axis], size, *values.shape[axis + 1 :])
    return torch.full(shape, -0.0, dtype=values.dtype).index_copy_(axis, torch.from_numpy(indices), values)


class Denominator:
    """The total weight behind every entry of a tensor, from the total weight of every choice.

    It is the product (weighted row indicators)^T (indicators of the other axes), whose rank is the number of choices;
    exact for whole weights that sum to less than 2^53. Neighbouring rows that every choice treats alike are one.

    Parameters
    ----------
    weights : mapping from choice to float
        At least one.
    shape : torch.Size
        The global tensor's; at least one axis.
    """

    def __init__(self, weights: Mapping[Choice, float], shape: torch.Size) -> None:
        rows, *others = [_indicators([choice and choice[axis] for choice in weights], n) for axis, n in enumerate(shape)]
        is_new = (rows[:, 1:] != rows[:, :-1]).any(0)
        self._kind = torch.cat([torch.zeros(1, dtype=torch.long), is_new.cumsum(0)])  # of each row
        firsts = torch.cat([torch.zeros(1, dtype=torch.long), 1 + is_new.nonzero()[:, 0]])
        self._rows = rows[:, firsts] * torch.tensor(list(weights.values()), dtype=torch.float64)[:, None]
        self._others = torch.ones(len(weights), 1, dtype=torch.float64)
        for other in others:
            self._others = (self._others[:, :, None] * other[:, None, :]).flatten(1)
        self._lengths, self._shape = [other.shape[1] for other in others], shape

    def rows(self, lo: int, hi: int) -> Tensor:
        """Return the weights behind the rows ``[lo, hi)``: (hi - lo, numbers per row), or 1 where they are all equal."""
        kinds = self._kind[lo:hi] if len(self._kind) > 1 else self._kind
        first, last = int(kinds[0]), int(kinds[-1])
        found = (self._rows[:, first : last + 1].T @ self._others).view(-1, *self._lengths)
        if found[0].numel() > 1:
            found = found.expand(-1, *self._shape[1:]).reshape(len(found), -1)
        found = found.view(len(found), -1)
        return found[kinds - first] if last > first else found


def _indicators(keeps: Sequence[Keep | None], size: int) -> Tensor:
    """Return which indices each choice has: (choices, size) of 0 and 1, or (choices, 1) of 1 if none is cut."""
    if all(keep is None or keep.is_full for keep in keeps):
        return torch.ones(len(keeps), 1, dtype=torch.float64)
    found = np.zeros((len(keeps), size))
    for row, keep in zip(found, keeps, strict=True):
        for start, stop in ((0, size),) if keep is None else keep.runs:
            row[start:stop] = 1.0
    return torch.from_numpy(found)
