"""Inverse of the damped Hessian of fewer input vectors than columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankInverse:
    r"""Inverse of :math:`H = D (XX^\top + rI) D` with X (n, k), k < n, D diagonal; no matrix of n by n is ever formed.

    By the Woodbury identity :math:`H^{-1} = D^{-1} (I - VV^\top) D^{-1} / r`, where :math:`V = XL^{-\top}` and
    :math:`LL^\top = X^\top X + rI`.

    Attributes
    ----------
    vectors : (n, k)
        V.
    ridge : float
        r, > 0.
    scale : (n,) or None
        Diagonal of D, > 0; None for ones.
    """

    vectors: Tensor
    ridge: float
    scale: Tensor | None = None

    @classmethod
    def of(cls, inputs: Tensor, ridge: float, dtype: torch.dtype, scale: Tensor | None = None) -> LowRankInverse:
        """Return the inverse for X = ``inputs``, (n, k) float64; V has some dtype."""
        small = inputs.T @ inputs
        small.diagonal().add_(ridge)
        quotient = torch.linalg.solve_triangular(torch.linalg.cholesky(small).T, inputs, upper=True, left=False)
        return cls(quotient.to(dtype).contiguous(), ridge, scale)

    def dense(self) -> Tensor:
        """Return the inverse as a matrix, (n, n)."""
        matrix = self.vectors @ self.vectors.T
        matrix.div_(-self.ridge).diagonal().add_(1.0 / self.ridge)
        return matrix if self.scale is None else matrix / self.scale / self.scale[:, None]


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Return the (units, size, size) diagonal blocks as a view."""
    units, (row, column) = len(matrix) // size, matrix.stride()
    return matrix.as_strided((units, size, size), (size * (row + column), row, column))
