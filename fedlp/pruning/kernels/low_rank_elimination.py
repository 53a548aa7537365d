r"""State of an elimination in the space of few input vectors.

With :math:`H^{-1} = (I - VV^\top) / r`, V (n, k), removal of the columns P and compensation by the others, S, give
(where H is scaled, of the scaled columns of W)

.. math:: M = I - V_P^\top V_P, \qquad B = W_P V_P, \qquad
          [H_{SS}]^{-1} = \tfrac1r (I - V_S M^{-1} V_S^\top), \qquad W_S \leftarrow W_S + B M^{-1} V_S^\top, \\
          L(P) = \tfrac r2 \big(\lVert W_P\rVert^2 + \operatorname{tr} B M^{-1} B^\top\big).

So a step is a few products with what is left, and a loss needs matrices of k columns only. Everything is computed from
V and W as they were at first: errors do not add up along the steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlp.errors import CalibrationError
from fedlp.pruning.kernels.elimination import Score, block_saliency, unit_columns
from fedlp.pruning.kernels.inverses import LowRankInverse


class LowRankState:
    r"""State of the elimination of one reader whose inverse Hessian has low rank; M and B are float64.

    Parameters
    ----------
    weight : (rows, n)
        Of the reader; not modified.
    inverse : LowRankInverse
    unit_size : int
        Consecutive columns per unit.
    """

    is_full = True  # after every step the removed units have to go: their blocks need not be positive definite

    def __init__(self, weight: Tensor, inverse: LowRankInverse, unit_size: int) -> None:
        self.size, self._ridge = unit_size, inverse.ridge
        scaled = weight if inverse.scale is None else weight * inverse.scale  # saliencies and losses stay as they are
        self._vectors, self._columns = inverse.vectors, scaled.T.to(inverse.vectors).contiguous()
        num_vectors, options = self._vectors.shape[1], {"dtype": torch.float64, "device": self._vectors.device}
        self._left = torch.eye(num_vectors, **options)  # type: ignore[call-overload] # M
        self._given = torch.zeros(len(weight), num_vectors, **options)  # type: ignore[call-overload] # B
        self._root_inv, self._projected = self._left.clone(), self._given.clone()  # of M; B times its transpose
        self._removed, self._loss = 0.0, 0.0
        self.units = torch.arange(len(self._vectors) // unit_size, device=self._vectors.device)

    def saliency(self, score: Score) -> Tensor:
        """Return the saliency of each unit, (units,)."""
        v = self._vectors @ self._root_inv.T.to(self._vectors)
        w = self._columns.addmm(v, self._projected.T.to(v))
        if self.size == 1:
            inv_blocks, gram_blocks = (part.square().sum(dim=1)[:, None, None] for part in (v, w))
            inv_blocks = 1.0 - inv_blocks
        else:
            v, w = (part.view(len(self.units), self.size, -1) for part in (v, w))
            inv_blocks, gram_blocks = (v @ v.mT).neg_(), w @ w.mT
            inv_blocks.diagonal(dim1=1, dim2=2).add_(1.0)
        return block_saliency(inv_blocks, gram_blocks.mul_(self._ridge), score, self.units)

    def remove(self, positions: Tensor) -> float:
        """Eliminate the units at some positions together; return the rise of the loss."""
        columns = unit_columns(positions, self.size)
        v, w = (part.index_select(0, columns).to(torch.float64) for part in (self._vectors, self._columns))
        self._left = self._left.addmm(v.T, v, alpha=-1.0)
        self._given = self._given.addmm(w.T, v)
        root, info = torch.linalg.cholesky_ex(self._left)
        if int(info):
            raise CalibrationError(
                "rounding has used up the precision of an inverse Hessian; raise damping (pruner.damping=0.01)"
            )
        eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
        self._root_inv = torch.linalg.solve_triangular(root, eye, upper=False)
        self._projected = self._given @ self._root_inv.T
        self._removed += float(w.square().sum())
        before, self._loss = self._loss, 0.5 * self._ridge * (self._removed + float(self._projected.square().sum()))
        return self._loss - before

    def flush(self, kept: Tensor) -> None:
        """Drop the removed units."""
        columns = unit_columns(kept, self.size)
        self._vectors, self._columns = self._vectors.index_select(0, columns), self._columns.index_select(0, columns)
        self.units = self.units[kept]
