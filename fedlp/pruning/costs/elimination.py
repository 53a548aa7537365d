"""Compute cost of scoring units by optimal brain surgeon."""

from __future__ import annotations

from collections.abc import Sequence

from fedlp.pruning.kernels.elimination import FEW_COLUMNS
from fedlp.pruning.kernels.large_steps import are_large

_FACTOR = 1.0 / 6.0  # of n³: Cholesky's factorisation
_SOLVE = 1.0 / 2.0  # of n² for each row: a triangular system


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


def quick_elimination_macs(
    inputs: int, columns: int, outputs: int, unit_size: int, steps: Sequence[int], block: int
) -> float:
    """Return the same with :mod:`~fedlp.pruning.kernels.large_steps`, counted step by step."""
    k, size = float(inputs), float(unit_size)
    per_step = size * sum(steps) / max(len(steps), 1)
    is_few = per_step < FEW_COLUMNS
    width, used, left = float(columns), 0.0, float(columns)  # columns at the last flush, removed since, and kept
    is_low = inputs < columns
    macs = k**2 * width * (1 + _SOLVE) + _FACTOR * k**3 if is_low else k * width**2 + _SOLVE * width**3
    began_large = is_large = is_low and bool(steps) and are_large(steps[0] * unit_size, inputs)
    macs += _root(k, outputs) if is_large else _start(width, k, outputs, size, is_low, is_few)
    for count in steps:
        gone = count * size
        macs += width * size**2 * (1 + _FACTOR)  # the scores
        used, left = used + gone, left - gone
        if is_large:
            macs += (
                width * (k**2 + (outputs + size) * k + size * outputs) + k * gone * (k + outputs) + _root(k, outputs)
            )
        else:
            macs += _step(gone, used - gone, width, outputs, size, k if is_low else 0.0, is_few)
        if left <= 0 or not (is_large or used >= block):
            continue
        if not is_large:
            macs += 2 * used * left**2 if is_few else outputs * used * left
            macs += k**2 * (used + _FACTOR * k + _SOLVE * left) if is_low else used * left**2
        elif not are_large(gone, inputs):
            is_large = False
            macs += left * k * (k + outputs) + _start(left, k, outputs, size, left > k, is_few)
        width, used = left, 0.0
        if began_large and is_low and not is_large and left <= k:
            is_low = False
            macs += k * left**2
    return macs


def _root(k: float, outputs: int) -> float:
    """Return the cost of the root of a large step's matrix (k, k), and of what it moves."""
    return (_FACTOR + _SOLVE) * k**3 + outputs * k**2


def _start(width: float, k: float, outputs: int, size: float, is_low: bool, is_few: bool) -> float:
    """Return the cost of the first blocks of an inverse and a Gram matrix."""
    return (k * size * width if is_low else 0.0) + outputs * width * (width if is_few else size)


def _step(gone: float, used: float, width: float, outputs: int, size: float, rank: float, is_few: bool) -> float:
    """Return the cost of a step that removes ``gone`` columns of ``width``, after ``used`` since the last flush."""
    macs = gone * width * (rank + 1.5 * gone + (3 if is_few else 2) * used) + (_FACTOR + _SOLVE) * gone**3
    macs += _SOLVE * gone**2 * width if is_few else gone * outputs * (width + _SOLVE * gone + 2 * used)
    return macs + (2 * width * size * gone if size > 1 else 0.0)
