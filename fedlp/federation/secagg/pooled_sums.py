r"""Sums over clients' data of one-shot pruning, as integers modulo 2^64 for a secure sum.

A sum :math:`s` of a client, of size :math:`2^b` at most, is sent as :math:`\operatorname{round}(2^{62 - b - l} s)`,
:math:`l = \lceil \log_2 n \rceil` of n clients, so that the sum over clients does not wrap, and is off by at most
:math:`n 2^{b + l - 63}` per entry. The bound is public: it depends on the kind of question alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.errors import DataError
from fedlp.federation.oneshot import messages as wire
from fedlp.federation.oneshot.messages import Part

_BITS: Mapping[str, int] = {
    wire.MOMENTS: 28,
    wire.NORMS: 28,
    wire.FISHER: 14,
    wire.VOTE: 0,
    wire.JUDGE: 28,
}  # before the point


@dataclass(frozen=True)
class PooledSums:
    """Layout of the sums of the clients of a group.

    Attributes
    ----------
    kind : str
        Kind of the question: moments, batch norms, Fisher information, votes or judgements.
    parts : sequence of Part
        Tensors of sums.
    num_clients : int
        Clients whose sum must not wrap.
    """

    kind: str
    parts: Sequence[Part]
    num_clients: int

    @property
    def size(self) -> int:
        """Integers of the vector: the number of examples, then all parts."""
        return 1 + sum(part.num_sent for part in self.parts)

    @property
    def _scale(self) -> float:
        return 2.0 ** (62 - _BITS[self.kind] - math.ceil(math.log2(max(self.num_clients, 2))))

    def error(self) -> float:
        """Return the bound on the error of an entry of the sum over all clients."""
        return self.num_clients / self._scale / 2

    def padded(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""Return packed sums with diagonals that no rounding can make too small for the other entries.

        Rounding adds a symmetric matrix of entries up to :math:`\epsilon`, of which no eigenvalue is below
        :math:`-\epsilon n`. Two more make up for it in the inequality of Cauchy and Schwarz.
        """
        found = dict(sums)
        for part in self.parts:
            if part.symmetric:
                rows = torch.arange(part.shape[0])
                diagonal = torch.zeros_like(sums[part.name])
                diagonal[rows * (rows + 3) // 2] = (2 + part.shape[0]) * self.error()
                found[part.name] = sums[part.name] + diagonal
            elif part.nonnegative:
                found[part.name] = sums[part.name] + 2 * self.error()
        return found

    def encode(self, sums: Mapping[str, Tensor], num_examples: int) -> NDArray[np.uint64]:
        """Return a client's sums; of symmetric ones the lower triangle is read.

        Raises
        ------
        DataError
            If one is not finite or out of range.
        """
        packed = wire.pack_sums(sums, self.parts, torch.float64)
        flat = [packed[part.name].detach().cpu().reshape(-1).numpy() for part in self.parts]
        values = np.concatenate([np.empty(0), *flat])
        if not (np.abs(values) <= 2.0 ** _BITS[self.kind]).all():
            raise DataError(f"a sum over the client's data is not finite, or larger than 2^{_BITS[self.kind]}")
        whole = np.rint(np.concatenate([[float(num_examples)], values * self._scale]))
        found: NDArray[np.uint64] = whole.astype(np.int64).view(np.uint64)
        return found

    def decode(self, total: NDArray[np.uint64]) -> tuple[dict[str, Tensor], int]:
        """Return the sums over all clients, packed as they were sent, and of how many examples they are."""
        values = total.view(np.int64).astype(np.float64)
        found, start = {}, 1
        for part in self.parts:
            shape = (part.num_sent,) if part.symmetric else part.shape
            stop = start + part.num_sent
            found[part.name] = torch.from_numpy(values[start:stop] / self._scale).view(shape)
            start = stop
        return found, int(values[0])
