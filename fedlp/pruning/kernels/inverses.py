"""Inverse Hessians for an elimination: some rows, the diagonal blocks, the inverse of the kept columns."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fedlp.errors import CalibrationError


class InverseHessian(Protocol):
    """Symmetric positive definite, (n, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the computation."""

    @property
    def device(self) -> torch.device:
        """Device of the computation."""

    def __len__(self) -> int: ...

    def rows(self, columns: Tensor) -> Tensor:
        """Return some rows, (columns, n), new."""

    def blocks(self, size: int) -> Tensor:
        """Return the diagonal blocks of some size, (n // size, size, size), new."""

    def eliminate(self, kept: Tensor, removed: Tensor, factor: Tensor) -> InverseHessian:
        """Return the inverse of the Hessian of the kept columns.

        Parameters
        ----------
        kept, removed : (n - r,), (r,)
            Columns.
        factor : (r, n - r)
            U: the inverse is that of now, of the kept columns, less UᵀU.
        """


class DenseInverse:
    """Inverse Hessian as a dense matrix."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self._matrix.dtype

    @property
    def device(self) -> torch.device:
        """Of the matrix."""
        return self._matrix.device

    def __len__(self) -> int:
        return len(self._matrix)

    def rows(self, columns: Tensor) -> Tensor:
        """Return some rows."""
        return self._matrix.index_select(0, columns)

    def blocks(self, size: int) -> Tensor:
        """Return the diagonal blocks."""
        return diagonal_blocks(self._matrix, size).clone()

    def eliminate(self, kept: Tensor, removed: Tensor, factor: Tensor) -> DenseInverse:
        """Return the matrix of the kept columns less UᵀU."""
        left = self._matrix.index_select(0, kept).index_select(1, kept)
        return DenseInverse(left.addmm_(factor.T, factor, alpha=-1.0))


class LowRankInverse:
    r"""Inverse Hessian of fewer input vectors than columns: :math:`H = XX^\top + rI` with X (n, k), k < n.

    By the Woodbury identity :math:`H^{-1} = (I - VV^\top) / r`, where :math:`V = XL^{-\top}` and
    :math:`LL^\top = X^\top X + rI`. When some columns of H go, with rows R of V, the same holds of
    :math:`VM^{-\top}` with the other rows, where :math:`MM^\top = I - V_R^\top V_R^{}`. So no matrix of n by n is ever
    formed.

    Parameters
    ----------
    vectors : (n, k)
        V.
    ridge : float
        r, > 0.
    turns_dense : bool
        Whether the inverse is a matrix from where on that is no larger than V.
    """

    def __init__(self, vectors: Tensor, ridge: float, turns_dense: bool = False) -> None:
        self.vectors, self.ridge, self._turns_dense = vectors, ridge, turns_dense

    @classmethod
    def of(cls, inputs: Tensor, ridge: float, dtype: torch.dtype) -> LowRankInverse:
        """Return the inverse for X = ``inputs``, (n, k) float64, in some dtype."""
        small = inputs.T @ inputs
        small.diagonal().add_(ridge)
        return cls(_divide(inputs, torch.linalg.cholesky(small)).to(dtype), ridge)

    @property
    def dtype(self) -> torch.dtype:
        """Of V."""
        return self.vectors.dtype

    @property
    def device(self) -> torch.device:
        """Of V."""
        return self.vectors.device

    def __len__(self) -> int:
        return len(self.vectors)

    def rows(self, columns: Tensor) -> Tensor:
        """Return some rows, by k products an entry."""
        rows = self.vectors.index_select(0, columns) @ self.vectors.T
        rows.div_(-self.ridge)
        rows[torch.arange(len(columns), device=rows.device), columns] += 1.0 / self.ridge
        return rows

    def blocks(self, size: int) -> Tensor:
        """Return the diagonal blocks."""
        units = self.vectors.view(len(self) // size, size, -1)
        blocks = (units @ units.mT).div_(-self.ridge)
        blocks.diagonal(dim1=1, dim2=2).add_(1.0 / self.ridge)
        return blocks

    def plain(self) -> InverseHessian:
        """Return this, or the matrix where it turns dense."""
        if not self._turns_dense or len(self) > self.vectors.shape[1]:
            return self
        matrix = (self.vectors @ self.vectors.T).div_(-self.ridge)
        matrix.diagonal().add_(1.0 / self.ridge)
        return DenseInverse(matrix)

    def eliminate(self, kept: Tensor, removed: Tensor, factor: Tensor) -> InverseHessian:
        """Return the inverse of the Hessian of the kept columns, from their rows of V."""
        gone = self.vectors.index_select(0, removed).to(torch.float64)
        left = torch.eye(gone.shape[1], dtype=torch.float64, device=gone.device).addmm_(gone.T, gone, alpha=-1.0)
        root, info = torch.linalg.cholesky_ex(left)
        if int(info):
            raise CalibrationError(
                "rounding has used up the precision of an inverse Hessian; raise damping (pruner.damping=0.01)"
            )
        vectors = _divide(self.vectors.index_select(0, kept), root.to(self.dtype))
        return LowRankInverse(vectors, self.ridge, self._turns_dense).plain()


def _divide(rows: Tensor, factor: Tensor) -> Tensor:
    """Return rows times the inverse transpose of a lower triangular factor, contiguous."""
    quotient: Tensor = torch.linalg.solve_triangular(factor.T, rows, upper=True, left=False)
    return quotient.contiguous()


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Return the (units, size, size) diagonal blocks as a view."""
    units, (row, column) = len(matrix) // size, matrix.stride()
    return matrix.as_strided((units, size, size), (size * (row + column), row, column))
