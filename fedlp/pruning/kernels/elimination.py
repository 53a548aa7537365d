"""State of a pivoted Cholesky factorisation of an inverse Hessian, and the matrices that saliencies need beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedlp.errors import CalibrationError
from fedlp.pruning.kernels.inverses import DenseInverse, InverseHessian, diagonal_blocks

Score = Literal["exact", "columns"]
FEW_COLUMNS = 4  # per step: with more, products with all of the weight are worth their while


@dataclass(frozen=True, slots=True)
class Problem:
    r"""Elimination problem of one reader; a unit's saliency is the sum over all readers of its layer.

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
    hessian_inv: Tensor | InverseHessian
    unit_size: int


class State(Protocol):
    """State of the elimination of one reader.

    Attributes
    ----------
    units : (positions,)
        Units that the positions stand for.
    used : int
        Columns removed since the last flush.
    """

    units: Tensor
    used: int

    def saliency(self, score: Score) -> Tensor:
        """Return the saliency of the unit at each position."""

    def remove(self, positions: Tensor) -> float:
        """Eliminate the units at some positions together; return the rise of the loss."""

    def flush(self, kept: Tensor) -> State:
        """Drop the removed units; return the state that goes on."""


class EliminationState:
    r"""State of the elimination of one reader.

    ``inv`` and ``weight`` hold the inverse Hessian and W as of the last flush. Since then, ``inv - UᵀU`` and
    ``weight - CU`` are their values, with one row of U and column of C per removed column. Where steps are small,
    ``gram``, WᵀW, takes the place of ``weight``: its value is ``gram - UᵀR - RᵀU``. Only the diagonal blocks, from
    which scores come, are always up to date.
    """

    def __init__(self, problem: Problem, block: int, columns_per_step: float, units: Tensor | None = None) -> None:
        self.size, self.block = problem.unit_size, block
        inverse = problem.hessian_inv
        self.inv: InverseHessian = DenseInverse(inverse) if isinstance(inverse, Tensor) else inverse
        self.weight = problem.weight.to(inverse.dtype)
        self.gram = self.weight.T @ self.weight if columns_per_step < FEW_COLUMNS else None
        self.inv_blocks = self.inv.blocks(self.size)
        if self.gram is not None:
            self.gram_blocks = diagonal_blocks(self.gram, self.size).clone()
        else:
            columns = self.weight.view(len(self.weight), -1, self.size).transpose(0, 1)
            self.gram_blocks = columns.mT @ columns
        self.units = torch.arange(len(self.inv_blocks), device=self.inv.device) if units is None else units
        self._start_panel()

    def saliency(self, score: Score) -> Tensor:
        """Return the saliency of each unit, (units,); 0 for removed units before the next flush."""
        return block_saliency(self.inv_blocks, self.gram_blocks, score, self.units)

    def remove(self, positions: Tensor) -> float:
        """Eliminate the units at some positions together; return the rise of the loss."""
        columns = columns_of(positions, self.size)
        u_panel, r_panel = self._panel[:, : self.used].unbind()
        u_columns, r_columns = u_panel.index_select(1, columns).T, r_panel.index_select(1, columns).T
        inv_rows = self.inv.rows(columns).addmm_(u_columns, u_panel, alpha=-1.0)
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

    def flush(self, kept: Tensor) -> EliminationState:
        """Apply the lazy updates and drop the removed units; return this."""
        columns = columns_of(kept, self.size)
        removed = torch.ones(len(self.inv), dtype=torch.bool, device=self.inv.device).index_fill_(0, columns, False)
        u, r = self._panel[:, : self.used].index_select(2, columns).unbind()
        self.inv = self.inv.eliminate(columns, removed.nonzero().flatten(), u)
        if self.gram is None:
            self.weight = self.weight.index_select(1, columns).addmm_(self._c[: self.used].T, u, alpha=-1.0)
        else:
            self.gram = self.gram.index_select(0, columns).index_select(1, columns)
            self.gram.addmm_(torch.cat((u, r)).T, torch.cat((r, u)), alpha=-1.0)
        self.inv_blocks, self.gram_blocks = self.inv_blocks[kept], self.gram_blocks[kept]
        self.units = self.units[kept]
        self._start_panel()
        return self

    def _start_panel(self) -> None:
        self._panel, self.used = self.weight.new_empty(2, self.block, len(self.inv)), 0
        self._c = self.weight.new_empty(0, len(self.weight))

    def _append(self, u: Tensor, r: Tensor, c: Tensor | None) -> None:
        missing = self.used + len(u) - self._panel.shape[1]
        if missing > 0:
            self._panel = torch.cat((self._panel, self._panel.new_empty(2, missing, len(self.inv))), dim=1)
        self._panel[0, self.used : self.used + len(u)] = u
        self._panel[1, self.used : self.used + len(u)] = r
        if c is not None:
            self._c = torch.cat((self._c[: self.used], c))
        self.used += len(u)


def block_saliency(inv_blocks: Tensor, gram_blocks: Tensor, score: Score, units: Tensor) -> Tensor:
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


def columns_of(units: Tensor, size: int) -> Tensor:
    """Return the columns of some units, unit by unit."""
    if size == 1:
        return units
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()
