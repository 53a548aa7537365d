"""Compute cost of scoring units by optimal brain surgeon."""

from __future__ import annotations

from collections.abc import Sequence

from fedlp.pruning.kernels.elimination import FEW_COLUMNS


def elimination_macs(
    inputs: int, columns: int, outputs: int, unit_size: int, steps: Sequence[int], block: int
) -> float:
    """Return the multiply-accumulates of inverting a reader's Hessian and eliminating its units.

    The leading terms of :mod:`fedlp.pruning.kernels.inverses` and :mod:`fedlp.pruning.kernels.elimination`; those of
    factorisations are the usual ones (a third of n³ flops for Cholesky's). Measured counts agree to a few per cent.

    Parameters
    ----------
    inputs : int
        Input vectors k behind the Hessian; with fewer than ``columns`` n its inverse has low rank.
    outputs : int
        Rows of the weight.
    steps : sequence of int
        Units per step.
    block : int
        Columns after which lazy updates are applied.
    """
    k, n = float(inputs), float(columns)
    gone = unit_size * sum(steps)
    per_step = gone / max(len(steps), 1)
    left = [n - done for done in range(block, columns, block)]  # columns, whenever lazy updates are applied
    squares = block * sum(size**2 for size in left)
    lazy = min(block, n)  # columns of updates that wait, at most
    width = gone * (n + lazy) / 2.0
    if k < n:
        inverse = 1.5 * k**2 * n + k**3 / 6.0 + k * width
        inverse += sum(k**3 / 6.0 + k**2 * block + k**2 * size / 2.0 for size in left)
    else:
        inverse = k * n**2 + n**3 / 2.0 + squares
    if per_step < FEW_COLUMNS:
        weights, panels = outputs * n**2 + 2.0 * squares, 3.0
    else:
        weights, panels = outputs * (width + block * sum(left) + n * unit_size + gone * lazy), 2.0
    return inverse + weights + width * (panels * lazy / 2.0 + 1.5 * per_step + 2.0 * unit_size)
