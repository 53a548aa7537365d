r"""Refit of a layer's weights for every number of removed units, from one triangular matrix.

With columns in the order of removal, let :math:`H^{-1} = U D U^\top`, U unit lower triangular. If the first r columns
go (P) and the rest stay (S), the least-squares weights of :func:`~fedlp.pruning.kernels.obs.resolve_weight` are

.. math:: W_S - W_P ([H^{-1}]_{PP})^{-1} [H^{-1}]_{PS} = W_S - W_P U_{PP}^{-\top} U_{SP}^\top,

for D cancels. So U serves all r, holds no scale of the inputs, and any rounding of it leaves it invertible.

The kernels are pure: tensors in, new tensors out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlp.errors import CalibrationError


def removal_factor(hessian_inv: Tensor, order: Tensor) -> Tensor:
    """Return U below its diagonal, row by row, (n (n - 1) / 2,), float64.

    Parameters
    ----------
    hessian_inv : (n, n)
        Inverse of the damped Hessian, symmetric positive definite.
    order : (n,)
        Columns in the order of removal.

    Raises
    ------
    CalibrationError
        If the inverse Hessian is not positive definite.
    """
    ordered = hessian_inv.to(torch.float64)[order][:, order]
    factor, info = torch.linalg.cholesky_ex(ordered)
    if int(info):
        raise CalibrationError("the inverse Hessian is not positive definite; raise pruner.damping")
    below: Tensor = (factor / factor.diagonal())[_below(len(order), factor.device)]
    return below


def unpack_factor(packed: Tensor, size: int) -> Tensor:
    """Return U, (size, size), float64, of what lies below its diagonal."""
    factor = torch.eye(size, dtype=torch.float64, device=packed.device)
    factor[_below(size, packed.device)] = packed.to(torch.float64)
    return factor


def refit_ordered(weight: Tensor, factor: Tensor, num_removed: int) -> Tensor:
    """Return the refitted weights of the columns that stay, (out, n - num_removed).

    Parameters
    ----------
    weight : (out, n)
        Columns in the order of removal.
    factor : (n, n)
        U, of the weight's dtype.
    num_removed : int
        Leading columns that go, in [0, n].
    """
    if not num_removed:
        return weight.clone()
    upper = factor[:num_removed, :num_removed].T
    shares = torch.linalg.solve_triangular(upper, weight[:, :num_removed], upper=True, left=False, unitriangular=True)
    return weight[:, num_removed:].addmm(shares, factor[num_removed:, :num_removed].T, alpha=-1.0)


def _below(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril_(-1)
