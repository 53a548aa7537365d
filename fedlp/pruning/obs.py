r"""Structured Optimal Brain Surgeon: which units of a layer's input to remove, and what the other weights become.

For a layer :math:`y = Wx` with Hessian :math:`H = \frac{2}{N}\sum xx^\top`, removing the columns :math:`u` of one unit
with optimal compensation raises the mean squared output error by

.. math:: \delta_u = \tfrac12 \operatorname{tr}\big(F\, W_{:,u} ([H^{-1}]_{uu})^{-1} W_{:,u}^\top\big), \qquad
          W \leftarrow W - W_{:,u}([H^{-1}]_{uu})^{-1}[H^{-1}]_{u,:}, \qquad
          H^{-1} \leftarrow H^{-1} - [H^{-1}]_{:,u}([H^{-1}]_{uu})^{-1}[H^{-1}]_{u,:},

where :math:`F` weighs the outputs (the identity, or their Fisher information). SlimGPT (Ling et al., NeurIPS 2024)
factorises the Hessian anew for every group of columns. Here it is inverted once: the elimination is a pivoted Cholesky
factorisation of :math:`H^{-1}`. Scores depend on the weights only through :math:`W^\top F W`. Where steps are small,
that matrix is carried along in the weights' place, so that a step reads a few rows only; and the weights are solved for
once, at the end: they do not depend on the order of removal.

The kernels are pure: tensors in, new tensors out. Where the blocks of lazy updates end does not change the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlp.errors import CalibrationError

Score = Literal["exact", "columns"]
_FEW_COLUMNS = 4  # per step: with more, products with all of the weight are worth their while
_BLOCK = 64  # columns whose updates are applied together, as one matrix product


@dataclass(frozen=True, slots=True)
class Problem:
    r"""One layer that reads the units: with several, a unit's saliency is the sum over them.

    Attributes
    ----------
    weight : (rows, n)
        The layer's weight, or :math:`F^{1/2} W`: any matrix whose Gram matrix is :math:`W^\top F W`.
    hessian_inv : (n, n)
        Inverse of the damped Hessian, symmetric positive definite.
    unit_size : int
        Consecutive columns per unit.
    """

    weight: Tensor
    hessian_inv: Tensor
    unit_size: int


@dataclass(frozen=True, slots=True)
class Elimination:
    """In which order units went, and what that cost.

    Attributes
    ----------
    order : tuple of int
        Units, first removed first; units of one step in the order of their saliency.
    steps : tuple of int
        Units per step.
    losses : tuple of float
        Loss after each step, in units of the squared output error; never falls.
    """

    order: tuple[int, ...]
    steps: tuple[int, ...]
    losses: tuple[float, ...]


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
    return _saliency(_diagonal_blocks(hessian_inv, unit_size), columns.mT @ columns, "exact", units)


def eliminate(
    problems: Sequence[Problem], schedule: Iterable[int], *, score: Score = "exact", block: int = _BLOCK
) -> Elimination:
    """Remove units step by step, each time those of the least saliency, and say in which order they went.

    Parameters
    ----------
    problems : sequence of Problem
        The layers that read the units; all with the same number of units, which stays untouched.
    schedule : iterable of int
        How many units each step removes together, >= 1; all ones is the exact greedy order. Their sum must be less than
        the number of units, or equal to it.
    score : "exact" or "columns"
        "columns" is SlimGPT's grouped Cholesky score: a unit's columns are eliminated one after the other, but without
        updating its weights. The same for units of one column.
    block : int
        Columns after which lazy updates are applied; purely a matter of speed.

    Raises
    ------
    CalibrationError
        If a block of the inverse Hessian stops being positive definite; names the unit.
    """
    counts = list(schedule)
    states = [_State(problem, block, sum(counts) * problem.unit_size / max(len(counts), 1)) for problem in problems]
    first = states[0]
    removed = torch.zeros_like(first.units, dtype=torch.bool)  # by position
    order: list[int] = []
    steps: list[int] = []
    losses: list[float] = []
    loss = 0.0
    for count in counts:
        saliency = torch.stack([state.saliency(score) for state in states]).sum(dim=0).masked_fill(removed, torch.inf)
        chosen = saliency.argmin()[None] if count == 1 else torch.sort(saliency, stable=True).indices[:count]
        loss += sum(state.remove(chosen) for state in states)
        removed[chosen] = True
        order += first.units[chosen].tolist()
        steps.append(count)
        losses.append(loss)
        if max(state.used for state in states) >= block:
            kept = (~removed).nonzero().flatten()
            for state in states:
                state.flush(kept)
            removed = removed[kept]
    return Elimination(tuple(order), tuple(steps), tuple(losses))


def resolve_weight(weight: Tensor, hessian_inv: Tensor, kept: Tensor, removed: Tensor) -> Tensor:
    r"""Return the least-squares weights on the kept columns, (out, kept), float dtype of ``hessian_inv``.

    .. math:: W_S - W_P ([H^{-1}]_{PP})^{-1} [H^{-1}]_{PS} = W H_{:,S} (H_{SS})^{-1}

    The one or the other form is used, whichever factorises the smaller matrix, but for rounding the same.
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


class _State:
    r"""What the elimination carries for one layer.

    ``inv`` and ``weight`` hold the inverse Hessian and W as of the last flush. Since then, ``inv - UᵀU`` and
    ``weight - CU`` are their values, with one row of U and column of C per removed column. Where steps are small,
    ``gram``, WᵀW, takes the place of ``weight``: its value is ``gram - UᵀR - RᵀU``. Only the diagonal blocks, from
    which scores come, are always up to date.
    """

    def __init__(self, problem: Problem, block: int, columns_per_step: float) -> None:
        self.size, self.block = problem.unit_size, block
        self.inv, self.weight = problem.hessian_inv, problem.weight.to(problem.hessian_inv.dtype)
        self.gram = self.weight.T @ self.weight if columns_per_step < _FEW_COLUMNS else None
        self.inv_blocks = _diagonal_blocks(self.inv, self.size).clone()
        if self.gram is not None:
            self.gram_blocks = _diagonal_blocks(self.gram, self.size).clone()
        else:
            columns = self.weight.view(len(self.weight), -1, self.size).transpose(0, 1)
            self.gram_blocks = columns.mT @ columns
        self.units = torch.arange(len(self.inv_blocks), device=self.inv.device)  # what the positions stand for
        self._start_panel()

    def saliency(self, score: Score) -> Tensor:
        return _saliency(self.inv_blocks, self.gram_blocks, score, self.units)

    def remove(self, positions: Tensor) -> float:
        """Eliminate the units at some positions together; return by how much the loss grows."""
        columns = _columns(positions, self.size)
        u_panel, r_panel = self._panel[:, : self.used].unbind()
        u_columns, r_columns = u_panel.index_select(1, columns).T, r_panel.index_select(1, columns).T
        inv_rows = self.inv.index_select(0, columns).addmm_(u_columns, u_panel, alpha=-1.0)
        factor, info = torch.linalg.cholesky_ex(inv_rows[:, columns])
        if int(info):
            raise _indefinite(self.units[positions[0]])
        u = torch.linalg.solve_triangular(factor, inv_rows, upper=False)
        if self.gram is None:
            c_panel = self._c[: self.used]
            w_columns = self.weight.index_select(1, columns).T.addmm(u_columns, c_panel, alpha=-1.0)
            c = torch.linalg.solve_triangular(factor, w_columns, upper=False)
            t = (c @ self.weight).addmm_(c @ c_panel.T, u_panel, alpha=-1.0)
        else:
            rows = self.gram.index_select(0, columns)
            rows.addmm_(u_columns, r_panel, alpha=-1.0).addmm_(r_columns, u_panel, alpha=-1.0)
            t, c = torch.linalg.solve_triangular(factor, rows, upper=False), None
        s = torch.linalg.solve_triangular(factor, t[:, columns].T, upper=False)
        r = t.addmm_(s, u, alpha=-0.5)
        self._append(u, r, c)
        u_blocks, r_blocks = (part.T.reshape(-1, self.size, len(columns)) for part in (u, r))
        if self.size == 1:
            self.inv_blocks -= u.square().sum(dim=0)[:, None, None]
            self.gram_blocks -= 2.0 * (u * r).sum(dim=0)[:, None, None]
        else:
            product = u_blocks @ r_blocks.mT
            self.inv_blocks -= u_blocks @ u_blocks.mT
            self.gram_blocks -= product + product.mT
        self.inv_blocks[positions] = torch.eye(self.size, dtype=self.inv.dtype, device=self.inv.device)
        self.gram_blocks[positions] = 0.0
        return 0.5 * float(s.trace())

    def flush(self, kept: Tensor) -> None:
        """Apply the lazy updates and forget what is removed."""
        columns = _columns(kept, self.size)
        u, r = self._panel[:, : self.used].index_select(2, columns).unbind()
        self.inv = self.inv.index_select(0, columns).index_select(1, columns).addmm_(u.T, u, alpha=-1.0)
        if self.gram is None:
            self.weight = self.weight.index_select(1, columns).addmm_(self._c[: self.used].T, u, alpha=-1.0)
        else:
            self.gram = self.gram.index_select(0, columns).index_select(1, columns)
            self.gram.addmm_(torch.cat((u, r)).T, torch.cat((r, u)), alpha=-1.0)
        self.inv_blocks, self.gram_blocks = self.inv_blocks[kept], self.gram_blocks[kept]
        self.units = self.units[kept]
        self._start_panel()

    def _start_panel(self) -> None:
        self._panel, self.used = self.inv.new_empty(2, self.block, len(self.inv)), 0
        self._c = self.inv.new_empty(0, len(self.weight))

    def _append(self, u: Tensor, r: Tensor, c: Tensor | None) -> None:
        missing = self.used + len(u) - self._panel.shape[1]
        if missing > 0:
            self._panel = torch.cat((self._panel, self._panel.new_empty(2, missing, len(self.inv))), dim=1)
        self._panel[0, self.used : self.used + len(u)] = u
        self._panel[1, self.used : self.used + len(u)] = r
        if c is not None:
            self._c = torch.cat((self._c[: self.used], c))
        self.used += len(u)


def _saliency(inv_blocks: Tensor, gram_blocks: Tensor, score: Score, units: Tensor) -> Tensor:
    """Return half the traces of ``inv⁻¹ gram`` per unit, or SlimGPT's form of it."""
    if inv_blocks.shape[-1] == 1:
        return 0.5 * gram_blocks.flatten() / inv_blocks.flatten()
    factors, info = torch.linalg.cholesky_ex(inv_blocks)
    if bool(info.any()):
        raise _indefinite(units[info.argmax()])
    ratios: Tensor
    if score == "columns":
        ratios = gram_blocks.diagonal(dim1=1, dim2=2) / factors.diagonal(dim1=1, dim2=2).square()
    else:
        ratios = torch.cholesky_solve(gram_blocks, factors).diagonal(dim1=1, dim2=2)
    return 0.5 * ratios.sum(dim=1)


def _indefinite(unit: Tensor) -> CalibrationError:
    return CalibrationError(
        f"the inverse Hessian of unit {int(unit)} is not positive definite: rounding has used up the precision; raise "
        "damping (pruner.damping=0.01) or give more calibration data"
    )


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Return the (units, size, size) diagonal blocks as a view."""
    units, (row, column) = len(matrix) // size, matrix.stride()
    return matrix.as_strided((units, size, size), (size * (row + column), row, column))


def _columns(units: Tensor, size: int) -> Tensor:
    """Return the columns of some units, unit by unit."""
    if size == 1:
        return units
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()
