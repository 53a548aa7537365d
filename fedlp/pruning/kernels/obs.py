r"""Structured Optimal Brain Surgeon: removal of units of a layer's input, and compensation by the other weights.

For a layer :math:`y = Wx` with Hessian :math:`H = \frac{2}{N}\sum xx^\top`, removing the columns :math:`u` of one unit
with optimal compensation raises the mean squared output error by

.. math:: \delta_u = \tfrac12 \operatorname{tr}\big(F\, W_{:,u} ([H^{-1}]_{uu})^{-1} W_{:,u}^\top\big), \qquad
          W \leftarrow W - W_{:,u}([H^{-1}]_{uu})^{-1}[H^{-1}]_{u,:}, \qquad
          H^{-1} \leftarrow H^{-1} - [H^{-1}]_{:,u}([H^{-1}]_{uu})^{-1}[H^{-1}]_{u,:},

where :math:`F` weighs the outputs (the identity, or their Fisher information). SlimGPT (Ling et al., NeurIPS 2024)
factorises the Hessian anew for every group of columns. Here it is inverted once: the elimination is a pivoted Cholesky
factorisation of :math:`H^{-1}`. Scores depend on the weights only through :math:`W^\top F W`. With small steps,
that matrix is carried along in the weights' place, so that a step reads a few rows only; and the weights are solved for
once, at the end: they do not depend on the order of removal.

The kernels are pure: tensors in, new tensors out. The block size of lazy updates does not change the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlp.errors import CalibrationError
from fedlp.pruning.kernels.elimination import EliminationState, Problem, Score, State, block_saliency
from fedlp.pruning.kernels.inverses import LowRankInverse, diagonal_blocks
from fedlp.pruning.kernels.large_steps import LargeSteps, are_large

__all__ = ["Elimination", "Problem", "eliminate", "output_error", "resolve_weight", "unit_saliency"]

_BLOCK = 64  # columns whose updates are applied together, as one matrix product


@dataclass(frozen=True, slots=True)
class Elimination:
    """Order of removal of a layer's units, and the losses along it.

    Attributes
    ----------
    order : tuple of int
        Units in the order of removal; units of one step in the order of their saliency.
    steps : tuple of int
        Units per step.
    losses : tuple of float
        Loss after each step, in units of the squared output error; non-decreasing. NaN if unknown.
    """

    order: tuple[int, ...]
    steps: tuple[int, ...]
    losses: tuple[float, ...]

    def saliency(self, num_units: int) -> Tensor:
        """Return the loss increase per unit, (units,), float64, non-decreasing along the order of removal.

        Units that were not removed have that of the last step, or 1 if none was removed.
        """
        if not self.order:
            return torch.ones(num_units, dtype=torch.float64)
        rises = np.maximum.accumulate(np.diff(self.losses, prepend=0.0).clip(min=0.0) / self.steps)
        left = sorted(set(range(num_units)) - set(self.order))
        found = torch.empty(num_units, dtype=torch.float64)
        found[[*self.order, *left]] = torch.from_numpy(np.repeat([*rises, rises[-1]], [*self.steps, len(left)]))
        return found


def unit_saliency(weight: Tensor, hessian_inv: Tensor, unit_size: int) -> Tensor:
    r"""Loss increase caused by removing each unit alone, with optimal compensation.

    .. math:: \delta_u = \tfrac12 \operatorname{tr}\big( W_{:,u} ([H^{-1}]_{uu})^{-1} W_{:,u}^\top \big)

    Parameters
    ----------
    weight : (out, n)
        Any float dtype; computed in the dtype of ``hessian_inv``. Not modified.
    hessian_inv : (n, n)
        Inverse of the damped Hessian; symmetric positive definite.
    unit_size : int
        Columns per unit (head_dim for heads, kh·kw for channels of a convolution, 1 for neurons); divides n.

    Returns
    -------
    (n // unit_size,)
        In units of the layer's squared output error; >= 0.

    Raises
    ------
    CalibrationError
        If a diagonal block is not positive definite; names the unit.
    """
    columns = weight.to(hessian_inv.dtype).view(len(weight), -1, unit_size).transpose(0, 1)
    units = torch.arange(len(columns), device=columns.device)
    return block_saliency(diagonal_blocks(hessian_inv, unit_size), columns.mT @ columns, "exact", units)


def eliminate(
    problems: Sequence[Problem],
    schedule: Iterable[int],
    *,
    score: Score = "exact",
    block: int = _BLOCK,
    large_steps: bool = False,
) -> Elimination:
    """Remove units step by step, those of the least saliency first; return their order and the losses along it.

    Parameters
    ----------
    problems : sequence of Problem
        One per reader, all with the same number of units; not modified.
    schedule : iterable of int
        Number of units that each step removes together, >= 1; all ones is the exact greedy order. Their sum is at most
        the number of units.
    score : "exact" or "columns"
        "columns" is SlimGPT's grouped Cholesky score: a unit's columns are eliminated one after the other, but without
        updating its weights. Equal to "exact" for units of one column.
    block : int
        Columns after which lazy updates are applied; purely a matter of speed.
    large_steps : bool
        Whether large steps of few input vectors have a kernel of their own; equal up to rounding.

    Raises
    ------
    CalibrationError
        If a block of the inverse Hessian stops being positive definite; names the unit.
    """
    counts = list(schedule)
    states = [_start(problem, counts, block, large_steps) for problem in problems]
    removed = torch.zeros_like(states[0].units, dtype=torch.bool)  # by position
    order: list[int] = []
    steps: list[int] = []
    losses: list[float] = []
    loss = 0.0
    for count in counts:
        saliency = torch.stack([state.saliency(score) for state in states]).sum(dim=0).masked_fill(removed, torch.inf)
        chosen = saliency.argmin()[None] if count == 1 else torch.sort(saliency, stable=True).indices[:count]
        loss += sum(state.remove(chosen) for state in states)
        removed[chosen] = True
        order += states[0].units[chosen].tolist()
        steps.append(count)
        losses.append(loss)
        if max(state.used for state in states) >= block and not bool(removed.all()):
            kept = (~removed).nonzero().flatten()
            states = [state.flush(kept) for state in states]
            removed = removed[kept]
    return Elimination(tuple(order), tuple(steps), tuple(losses))


def _start(problem: Problem, counts: Sequence[int], block: int, large_steps: bool) -> State:
    """Return the state in which the elimination of a reader begins."""
    inverse, size = problem.hessian_inv, problem.unit_size
    per_step = sum(counts) * size / max(len(counts), 1)
    if (
        (large_steps and counts and isinstance(inverse, LowRankInverse))
        and are_large(counts[0] * size, inverse.vectors.shape[1])
    ):  # fmt: skip
        return LargeSteps(problem, inverse, block, per_step)
    return EliminationState(problem, block, per_step)


def resolve_weight(weight: Tensor, hessian_inv: Tensor, kept: Tensor, removed: Tensor) -> Tensor:
    r"""Return the least-squares weights on the kept columns, (out, kept), float dtype of ``hessian_inv``.

    .. math:: W_S - W_P ([H^{-1}]_{PP})^{-1} [H^{-1}]_{PS} = W H_{:,S} (H_{SS})^{-1}

    The form with the smaller matrix to factorise is used; both agree up to rounding.
    """
    w = weight.to(hessian_inv.dtype)
    if not len(removed):
        return w[:, kept]
    rows = hessian_inv.index_select(0, removed)
    factor, info = torch.linalg.cholesky_ex(rows.index_select(1, removed))
    if int(info):
        raise CalibrationError("the inverse Hessian of the removed columns is not positive definite; raise damping")
    correction = torch.cholesky_solve(rows.index_select(1, kept), factor)
    return w.index_select(1, kept).addmm_(w.index_select(1, removed), correction, alpha=-1.0)


def output_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    r"""Return :math:`\tfrac12\operatorname{tr}(\Delta H \Delta^\top)` with :math:`\Delta` = ``pruned - weight``."""
    delta = (pruned - weight).to(hessian.dtype)
    return 0.5 * float(((delta @ hessian) * delta).sum())
