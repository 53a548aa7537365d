"""Kernels of an average in blocks: weighted sums of rows, casts, memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 18  # numbers per block: 2 MiB of sums and as much of scratch


def add_weighted(sums: Tensor, stack: Tensor, weights: Sequence[float], is_summed: bool) -> None:
    """Add weighted rows to sums, row by row, in blocks of columns; set the sums where they hold nothing yet.

    Parameters
    ----------
    sums : (numbers,)
        float64; changed.
    stack : (rows, numbers)
        Of at most 24 bits of mantissa, so that products with whole weights below 2^29 are exact.
    """
    wide = torch.empty(0, dtype=torch.float64)
    factors = torch.tensor(weights, dtype=torch.float64)[:, None]
    step = max(1, BLOCK // (4 * len(stack)))
    for lo in range(0, stack.shape[1], step):
        part, into = stack[:, lo : lo + step], sums[lo : lo + step]
        rows = wide.resize_(part.shape).copy_(part).mul_(factors).numpy()
        if is_summed:
            rows[0] += into.numpy()
        if rows.shape[1] == 1:
            into[0] = float(np.add.accumulate(rows[:, 0])[-1])
        else:  # row by row, since the first axis is not contiguous; a contiguous one would be added pairwise
            np.add.reduce(rows, axis=0, out=into.numpy())


def write_average(average: Tensor, out: Tensor) -> None:
    """Cast an average into ``out``; it is rounded in place where that holds integers."""
    out.copy_(average if out.is_floating_point() else average.round_())


def empty(numel: int, dtype: torch.dtype) -> Tensor:
    """Return uninitialised memory; numpy asks for huge pages, which makes its first touch several times cheaper."""
    memory = torch.from_numpy(np.empty(numel * dtype.itemsize + 64, np.uint8))
    start = -memory.data_ptr() % 64
    return memory[start : start + numel * dtype.itemsize].view(dtype)
