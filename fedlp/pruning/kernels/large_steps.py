r"""Elimination in large steps of few input vectors: all that is carried along is as small as their number.

Of :math:`H^{-1} = (I - VV^\top)/r` with V (n, k), and weights W, the columns R go. With
:math:`K = I - V_R^\top V_R^{}` and :math:`E = W_R V_R`, of the kept columns S

.. math:: H_{SS}^{-1} = (I - V_S K^{-1} V_S^\top) / r, \qquad W_S \leftarrow W_S + E K^{-1} V_S^\top, \qquad
          \text{loss} = \tfrac r2 \operatorname{tr}\big(F (W_R W_R^\top + E K^{-1} E^\top)\big)

(Woodbury's identity), so that a step costs as much as its scores, however many columns go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlp.errors import CalibrationError
from fedlp.pruning.kernels.elimination import (
    EliminationState,
    Problem,
    Score,
    State,
    block_saliency,
    columns_of,
)
from fedlp.pruning.kernels.inverses import LowRankInverse

LARGE = 4  # a step is large if it removes a column for so many input vectors, or more


class LargeSteps:
    """State of the elimination of one reader, as :class:`~fedlp.pruning.kernels.elimination.EliminationState`."""

    used = 1 << 62  # is flushed after each step

    def __init__(self, problem: Problem, inverse: LowRankInverse, block: int, columns_per_step: float) -> None:
        self.units = torch.arange(len(inverse) // problem.unit_size, device=inverse.device)
        self._size, self._block, self._per_step = problem.unit_size, block, columns_per_step
        self._vectors, self._ridge = inverse.vectors, inverse.ridge
        self._weight = problem.weight.to(inverse.dtype)
        k = self._vectors.shape[1]
        self._left = torch.eye(k, dtype=torch.float64, device=inverse.device)  # K
        self._lost = self._weight.new_zeros(len(self._weight), k)  # E
        self._loss, self._gone = 0.0, 0.0
        self._factorise()

    def saliency(self, score: Score) -> Tensor:
        """Return the saliency of each unit, (units,)."""
        vectors, weight = self._now()
        rows = vectors.view(len(self.units), self._size, -1)
        blocks = (rows @ rows.mT).neg_()
        blocks.diagonal(dim1=1, dim2=2).add_(1.0)
        columns = weight.view(len(weight), -1, self._size).transpose(0, 1)
        return self._ridge * block_saliency(blocks, columns.mT @ columns, score, self.units)

    def remove(self, positions: Tensor) -> float:
        """Eliminate the units at some positions together; return the rise of the loss."""
        columns = columns_of(positions, self._size)
        vectors, weight = self._vectors.index_select(0, columns), self._weight.index_select(1, columns)
        wide = vectors.to(torch.float64)
        self._left.addmm_(wide.T, wide, alpha=-1.0)
        self._lost.addmm_(weight, vectors)
        self._gone += float(weight.square().sum(dtype=torch.float64))
        self._removed = len(columns)
        self._factorise()
        before = self._loss
        self._loss = 0.5 * self._ridge * (self._gone + float(self._moved.square().sum(dtype=torch.float64)))
        return self._loss - before

    def flush(self, kept: Tensor) -> State:
        """Drop the removed units; return the state that goes on, another one where steps are no longer large."""
        columns = columns_of(kept, self._size)
        self._vectors = self._vectors.index_select(0, columns)
        self._weight = self._weight.index_select(1, columns)
        self.units = self.units[kept]
        if are_large(self._removed, len(self._left)):
            return self
        vectors, weight = self._now()
        problem = Problem(weight, LowRankInverse(vectors, self._ridge, turns_dense=True).plain(), self._size)
        return EliminationState(problem, self._block, self._per_step, self.units)

    def _factorise(self) -> None:
        factor, info = torch.linalg.cholesky_ex(self._left)
        if int(info):
            raise CalibrationError(
                "rounding has used up the precision of an inverse Hessian; raise damping (pruner.damping=0.01)"
            )
        self._root = _invert(factor).T.to(self._weight.dtype)  # of K's inverse
        self._moved = self._lost @ self._root

    def _now(self) -> tuple[Tensor, Tensor]:
        """Return V and the weights as of the last step."""
        vectors = self._vectors @ self._root
        return vectors, torch.addmm(self._weight, self._moved, vectors.T)


def are_large(columns: float, inputs: int) -> bool:
    """Return whether steps that remove so many columns are large for so many input vectors."""
    return LARGE * columns >= inputs


def _invert(factor: Tensor) -> Tensor:
    """Return the inverse of a lower triangular matrix: to multiply by it is several times as fast as to solve."""
    unit = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, unit, upper=False)
    return inverse
