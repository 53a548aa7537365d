"""Updates held back, and the segments of memory in which they are added together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.federation.aggregation.coverage import WHOLE, Region

_NARROW = (torch.float32, torch.bfloat16, torch.float16)  # at most 24 bits of mantissa


@dataclass(slots=True)
class Entry:
    """One tensor of one update."""

    values: Tensor
    region: Region

    @property
    def is_flat(self) -> bool:
        """Whether it is the whole tensor, in one run."""
        return self.region is WHOLE and self.values.is_contiguous()

    def follows(self, before: Entry | None) -> bool:
        """Whether it directly follows another in memory, so that both are one run."""
        if before is None or not (self.is_flat and before.is_flat):
            return False
        one, two = before.values, self.values
        if one.dtype != two.dtype or one.data_ptr() + one.nbytes != two.data_ptr():
            return False
        return one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()


@dataclass(slots=True)
class HeldUpdate:
    """An update held back.

    Attributes
    ----------
    joined : set of str
        Tensors that directly follow their predecessor of the model in the update's memory.
    """

    entries: dict[str, Entry]
    joined: set[str]
    weight: float

    def joins(self, before: str, name: str) -> bool:
        """Whether two neighbours of the model are one run here, or both missing."""
        return name in self.joined or not (name in self.entries or before in self.entries)

    def is_exact(self, dtype: torch.dtype) -> bool:
        """Whether the weight (of at most 29 bits) times any value (of at most 24) is exact in float64 (53)."""
        mantissa, exponent = math.frexp(self.weight)
        return dtype in _NARROW and abs(exponent) <= 128 and (mantissa * 2**29).is_integer()


@dataclass(slots=True)
class Part:
    """Addend of one update to a segment; ``is_exact``: whether products with the weight are exact."""

    values: Tensor
    region: Region
    weight: float
    is_exact: bool


@dataclass(slots=True)
class Segment:
    """A tensor, or neighbouring tensors as one flat run.

    Attributes
    ----------
    start : int
        Offset of its sums.
    is_summed : bool
        Whether its sums hold an update already.
    """

    names: list[str]
    start: int
    shape: torch.Size
    parts: list[Part]
    is_summed: bool

    def blocks(self, numel: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows, each of at most ``numel`` numbers or of one row."""
        step = max(1, numel // max(1, self.shape[1:].numel()))
        for lo in range(0, self.shape[0], step):
            yield lo, min(lo + step, self.shape[0])

    def rows(self, flat: Tensor, lo: int, hi: int) -> Tensor:
        """Return the rows ``[lo, hi)`` of a buffer that begins with the segment."""
        row = self.shape[1:].numel()
        return flat[lo * row : hi * row].view(hi - lo, *self.shape[1:])
