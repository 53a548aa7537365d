"""Coverage of a tensor: entries of each update, and the total weight of each entry.

A choice of indices is one Keep per dimension: a product of runs, so a union of rectangles. No mask of a tensor's own
size is made while updates come in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.types import Keep

Keeps = tuple[Keep, ...]

_MIN_RECTANGLE = 4096  # numbers: below this on average, one step over the whole tensor beats a step per rectangle


class Region:
    """Part of a tensor that an update covers; this class covers all of it.

    Attributes
    ----------
    keeps : tuple of Keep, or None
        Kept indices of each dimension; None for the whole tensor.
    """

    def __init__(self, keeps: Keeps | None = None) -> None:
        self.keeps = keeps
        self.shape = None if keeps is None else tuple(keep.count for keep in keeps)

    def pieces(self, values: Tensor, total: Tensor, lo: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield disjoint views of ``total`` and the update's addend of each.

        Parameters
        ----------
        values : Tensor
            The update's tensor.
        total : Tensor
            Sums of the global tensor's rows from ``lo`` on.
        """
        yield total, values[lo : lo + total.shape[0]]


class Slices(Region):
    """Region of few rectangles, each a view."""

    def __init__(self, keeps: Keeps) -> None:
        super().__init__(keeps)
        last_cut = max(axis for axis, keep in enumerate(keeps) if not keep.is_full)
        rows, *others = [_runs(keep) for keep in keeps[: last_cut + 1]]
        self._rectangles = [
            (row, tuple(slice(a, b) for a, b, _ in other), tuple(slice(i, i + b - a) for a, b, i in other))
            for row, *other in product(rows, *others)
        ]

    def pieces(self, values: Tensor, total: Tensor, lo: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the view of ``total`` of every rectangle."""
        hi = lo + total.shape[0]
        for (start, stop, before), into, of in self._rectangles:
            top, end = max(start, lo), min(stop, hi)
            if top < end:
                shift = before - start
                yield total[(slice(top - lo, end - lo), *into)], values[(slice(top + shift, end + shift), *of)]


class Scatter(Region):
    """Region of many small rectangles: values are scattered over all of ``total``, with -0.0, which changes no sum."""

    def __init__(self, keeps: Keeps) -> None:
        super().__init__(keeps)
        self._indices = [None if keep.is_full else keep.indices() for keep in keeps]

    def pieces(self, values: Tensor, total: Tensor, lo: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all of ``total``."""
        rows, *others = self._indices
        hi = lo + total.shape[0]
        first, last = (lo, hi) if rows is None else np.searchsorted(rows, (lo, hi))
        values = values[first:last]
        for axis in range(total.ndim - 1, 0, -1):
            values = _spread(values, axis, others[axis - 1], total.shape[axis])
        yield total, _spread(values, 0, rows if rows is None else rows[first:last] - lo, hi - lo)


WHOLE = Region()


def region(keeps: Keeps | None) -> Region:
    """Return the region of kept indices; None is the whole tensor."""
    return WHOLE if keeps is None else _region(keeps)


@lru_cache(maxsize=256)
def _region(keeps: Keeps) -> Region:
    if all(keep.is_full for keep in keeps):
        return WHOLE
    count = math.prod(len(keep.runs) for keep in keeps)
    is_scattered = count > 4 and math.prod(keep.count for keep in keeps) < count * _MIN_RECTANGLE
    return Scatter(keeps) if is_scattered else Slices(keeps)


class Denominator:
    """Total weight of every entry of a tensor, from the total weight of every region.

    It is the product (weighted row indicators)^T (indicators of the other axes), whose rank is the number of regions;
    exact for whole weights that sum to less than 2^53. Neighbouring rows that all regions treat alike are one.

    Parameters
    ----------
    weights : tuple of (Region, float)
        At least one.
    shape : torch.Size
        The global tensor's; at least one axis and one entry.
    """

    def __init__(self, weights: tuple[tuple[Region, float], ...], shape: torch.Size) -> None:
        rows, *others = [
            _indicators([None if part.keeps is None else part.keeps[axis] for part, _ in weights], size)
            for axis, size in enumerate(shape)
        ]
        is_new = (rows[:, 1:] != rows[:, :-1]).any(0)
        self._kind = torch.cat([torch.zeros(1, dtype=torch.long), is_new.cumsum(0)])  # of each row
        firsts = torch.cat([torch.zeros(1, dtype=torch.long), 1 + is_new.nonzero()[:, 0]])
        self._rows = rows[:, firsts] * torch.tensor([[weight] for _, weight in weights], dtype=torch.float64)
        self._others = torch.ones(len(weights), 1, dtype=torch.float64)
        for other in others:
            self._others = (self._others[:, :, None] * other[:, None, :]).flatten(1)
        self._lengths, self._shape = [other.shape[1] for other in others], shape[1:]

    def rows(self, lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
        """Return the weights of the rows ``[lo, hi)``.

        Returns
        -------
        weights : (kinds, numbers per row), or (kinds, 1) where every row is behind one weight
        kinds : (hi - lo,) or None
            Which row of ``weights`` is that of each row; None if there is only one.
        """
        kinds = self._kind[lo:hi] if len(self._kind) > 1 else self._kind
        first, last = int(kinds[0]), int(kinds[-1])
        found = self._rows[:, first : last + 1].T @ self._others
        if found.shape[1] > 1:
            found = found.view(-1, *self._lengths).expand(-1, *self._shape).reshape(len(found), -1)
        return found, kinds - first if last > first else None


def _runs(keep: Keep) -> list[tuple[int, int, int]]:
    """Return start and stop of each run, and the number of kept indices before it."""
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


def _indicators(keeps: Sequence[Keep | None], size: int) -> Tensor:
    """Return the 0/1 indicators of each region's indices, (regions, size); (regions, 1) of 1 if none is cut."""
    if all(keep is None or keep.is_full for keep in keeps):
        return torch.ones(len(keeps), 1, dtype=torch.float64)
    found = np.zeros((len(keeps), size))
    for row, keep in zip(found, keeps, strict=True):
        for start, stop in ((0, size),) if keep is None else keep.runs:
            row[start:stop] = 1.0
    return torch.from_numpy(found)
