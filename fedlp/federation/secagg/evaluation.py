"""Evaluation sums of clients, as integers modulo 2^64 for a secure sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlp.errors import DataError
from fedlp.tasks import Sums

_SUM_BITS = 34  # before the point


@dataclass(frozen=True)
class EvaluationSums:
    """Layout of the evaluation sums of a group's clients.

    Attributes
    ----------
    lengths : mapping from name to int
        Numbers of each sum; 0 for a number that is no list.
    num_clients : int
        Clients whose sum must not wrap.
    """

    lengths: Mapping[str, int]
    num_clients: int

    @classmethod
    def of(cls, sums: Sums, num_clients: int) -> EvaluationSums:
        """Return the layout of a client's sums."""
        lengths = {name: len(value) if isinstance(value, list) else 0 for name, value in sums.items()}
        return cls(lengths, num_clients)

    @property
    def size(self) -> int:
        """Integers of the vector: the number of examples, then all sums by name."""
        return 1 + sum(max(length, 1) for length in self.lengths.values())

    @property
    def _scale(self) -> float:
        return 2.0 ** (62 - _SUM_BITS - math.ceil(math.log2(max(self.num_clients, 2))))

    def encode(self, sums: Sums, num_examples: int) -> NDArray[np.uint64]:
        """Return a client's sums; DataError where one is not finite or out of range."""
        values = np.concatenate([np.atleast_1d(np.asarray(sums[name], np.float64)) for name in sorted(self.lengths)])
        if not (np.abs(values) <= 2.0**_SUM_BITS).all():
            raise DataError("an evaluation sum is not finite, or larger than 2^34")
        whole = np.rint(np.concatenate([[float(num_examples)], values * self._scale]))
        found: NDArray[np.uint64] = whole.astype(np.int64).view(np.uint64)
        return found

    def decode(self, total: NDArray[np.uint64]) -> tuple[dict[str, float | list[float]], int]:
        """Return the sums over all clients, and of how many examples they are."""
        values = total.view(np.int64).astype(np.float64)
        found: dict[str, float | list[float]] = {}
        rest = values[1:] / self._scale
        for name in sorted(self.lengths):
            length = self.lengths[name]
            found[name] = rest[:length].tolist() if length else float(rest[0])
            rest = rest[max(length, 1) :]
        return found, int(values[0])
