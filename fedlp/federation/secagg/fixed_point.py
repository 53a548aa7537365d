r"""Updates as integers modulo 2^b, so that sums of masked ones are exact.

A value :math:`d` in :math:`[-R, R]` of a client of weight :math:`w` is sent as the integer

.. math:: q = \operatorname{round}(2^f d w / M), \qquad f = \lfloor \log_2 ((2^{b-1} - 1 - n) / (n R)) \rfloor

of ``n`` clients whose largest weight is M. Sums of n integers do not wrap, and the weighted mean is off by at most
:math:`n M / (W 2^{f+1})`, where W is the sum of the weights that count; values beyond the range are clipped,
and how many were is part of the sum. Values are differences from the received ones. Buffers and integers, such as
running variances and batches seen, have a range and a step that are ``BUFFER_RANGE`` times as large.

Sums over a client's data (its examples, loss, scores, input norms) travel beside them as 64-bit integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.federation.secagg.keys import Words
from fedlp.federation.wire.packing import Signature

BUFFER_RANGE = 1024.0
_MOST_FRACTION_BITS = 44  # float64 resolves no more of a value near the range


@dataclass(frozen=True)
class FixedPoint:
    """Fixed-point values of the clients of one sum.

    Attributes
    ----------
    bits : 32 or 64
        Of each integer.
    value_range : float
        Largest absolute value.
    num_clients : int
        Clients whose sum must not wrap.
    """

    bits: int
    value_range: float
    num_clients: int

    @property
    def fraction_bits(self) -> int:
        """Bits behind the point; negative where the range is too large for the integers."""
        largest = 2.0 ** (self.bits - 1) - 1 - self.num_clients
        return min(_MOST_FRACTION_BITS, math.floor(math.log2(largest / (self.num_clients * self.value_range))))

    def error(self, largest_weight: float, total_weight: float) -> float:
        """Return the bound on the error of a weighted mean of values that were not clipped."""
        return self.num_clients * largest_weight / total_weight / 2.0 ** (self.fraction_bits + 1)

    def encode(self, values: NDArray[np.float64], share: float) -> Words:
        """Return values times ``share``, in (0, 1], as integers modulo 2^bits; values are clipped."""
        clipped = np.clip(values, -self.value_range, self.value_range)
        whole = np.rint(clipped * (share * 2.0**self.fraction_bits)).astype(np.int64)
        found: Words = whole.view(np.uint64) if self.bits == 64 else whole.astype(np.uint32)
        return found

    def decode(self, total: Words) -> NDArray[np.float64]:
        """Return the sum that integers stand for."""
        signed = total.view(np.int64 if self.bits == 64 else np.int32)
        return signed.astype(np.float64) / 2.0**self.fraction_bits

    def clips(self, values: NDArray[np.float64]) -> int:
        """Return how many values are out of range."""
        return int(np.count_nonzero(np.abs(values) > self.value_range))


def flatten(params: Mapping[str, Tensor], signature: Signature, trained: frozenset[str]) -> NDArray[np.float64]:
    """Return differences as one vector in units of their ranges: buffers are divided by ``BUFFER_RANGE``."""
    parts = [np.empty(0)]
    for name, _, _ in signature:
        part = params[name].detach().cpu().to(torch.float64).reshape(-1).numpy()
        parts.append(part if name in trained else part / BUFFER_RANGE)
    return np.concatenate(parts)


def unflatten(flat: NDArray[np.float64], signature: Signature, trained: frozenset[str]) -> dict[str, Tensor]:
    """Return the differences, float64, of a vector in units of their ranges."""
    found, start = {}, 0
    for name, shape, _ in signature:
        stop = start + math.prod(shape)
        part = torch.from_numpy(flat[start:stop]).view(shape)
        found[name] = part if name in trained else part * BUFFER_RANGE
        start = stop
    return found
