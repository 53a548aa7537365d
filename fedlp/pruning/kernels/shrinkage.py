r"""Regularisation of an estimate from few vectors, by how far two halves of the data agree on it.

Two halves of the data give independent estimates A and B of a matrix, all data their mean H. In expectation
:math:`\langle A, B\rangle` is the squared norm of the true matrix, and :math:`\lVert H\rVert^2` that and the noise of
H. So their quotient is the weight of H in the linear shrinkage of least expected squared error (Ledoit and Wolf, 2004),
measured where they assume independent vectors: vectors of one text or image resemble each other. Many vectors give a
weight near 1, and nothing is to be chosen.

The kernels are pure: tensors in, new tensors out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlp.pruning.kernels.hessian import Moments, factor_hessian, invert_hessian

_LARGEST_WEIGHT = 1.0 - 1e-6  # some of the diagonal always stays: a singular Hessian becomes positive definite
_RIDGE = 1e-9  # of the mean diagonal entry, against inputs that are always zero


def solve_shrunk(
    weight: Tensor, moments: Moments, half: Moments, centred: bool, correction: float, layer: str
) -> tuple[Tensor, Tensor]:
    """Return the weights (out, n) that fit the targets, or as they are without targets, and the inverse Hessian (n, n).

    Parameters
    ----------
    weight : (out, n)
        Float64.
    moments, half : Moments
        Of all vectors, and of half of them; a half without vectors gives a diagonal Hessian and no correction.
    centred : bool
        Whether inputs are less their means.
    correction : float
        Factor of the correction towards the targets, in [0, 1].
    layer : str
        Named in errors.

    Raises
    ------
    CalibrationError
        As :func:`~fedlp.pruning.kernels.hessian.invert_hessian`, where inputs are not finite.
    """
    whole, share, strength = moments.hessian(centred), 0.0, 0.0
    if 0 < half.count < moments.count:
        hessians, missed = [half.hessian(centred)], [_missed(weight, half, centred)]
        rest = moments - half
        hessians, missed = [*hessians, rest.hessian(centred)], [*missed, _missed(weight, rest, centred)]
        del rest  # matrices are large
        share = hessian_weight(hessians[0], hessians[1], whole)
        if moments.cross is not None:
            steps = [_step(m, h, share, layer) for m, h in zip(missed, hessians, strict=True)]
            strength = correction * correction_weight(steps, missed, hessians)
        del hessians
    inverse = invert_hessian(shrink_hessian(whole, share), _RIDGE, layer, moments.count)
    if not strength:
        return weight, inverse
    return weight + strength * _missed(weight, moments, centred) @ inverse, inverse


def _missed(weight: Tensor, moments: Moments, centred: bool) -> Tensor:
    """Return the target Hessian less the weights times the Hessian, (out, n); nothing without targets."""
    if moments.cross is None:
        return weight[:0]
    return moments.target_hessian(centred) - weight @ moments.hessian(centred)


def _step(missed: Tensor, hessian: Tensor, share: float, layer: str) -> Tensor:
    """Return the correction that one half of the data asks for, (out, n)."""
    factor = factor_hessian(shrink_hessian(hessian, share), _RIDGE, layer, len(hessian))
    return torch.cholesky_solve(missed.T, factor).T


def hessian_weight(first: Tensor, second: Tensor, whole: Tensor) -> float:
    r"""Return the weight :math:`\alpha` of a Hessian in its shrinkage towards its diagonal, in [0, 1 - 10^-6].

    .. math:: \alpha = \frac{\langle \tilde A, \tilde B\rangle}{\lVert\tilde H\rVert^2}, \qquad
              \tilde M_{ij} = \frac{M_{ij}}{\sqrt{H_{ii} H_{jj}}} \; (i \ne j), \quad \tilde M_{ii} = 0.

    Parameters
    ----------
    first, second, whole : (n, n)
        Hessians A and B of the two halves and H of all data, symmetric positive semi-definite.
    """
    scale = whole.diagonal()
    scale = torch.where(scale > 0, 1.0 / scale, 0.0)

    def product(left: Tensor, right: Tensor) -> float:
        return float(scale @ ((left * right).fill_diagonal_(0.0) @ scale))

    norm = product(whole, whole)
    return min(max(product(first, second) / norm, 0.0), _LARGEST_WEIGHT) if norm > 0 else 0.0


def shrink_hessian(hessian: Tensor, weight: float) -> Tensor:
    r"""Return :math:`S = \alpha H + (1 - \alpha) \operatorname{diag}(H)`, (n, n).

    Parameters
    ----------
    hessian : (n, n)
    weight : float
        :math:`\alpha`, in [0, 1].
    """
    shrunk = weight * hessian
    shrunk.diagonal().copy_(hessian.diagonal())
    return shrunk


def correction_weight(steps: Sequence[Tensor], missed: Sequence[Tensor], hessians: Sequence[Tensor]) -> float:
    r"""Return the weight of the correction of earlier layers' errors that does best on the other half, in [0, 1].

    The correction of one half is :math:`M_k = R_k S_k^{-1}`, where :math:`R_k` is the target Hessian less the weights
    times the Hessian. On the other half c times it lowers the squared error most at

    .. math:: c = \frac{\langle M_a, R_b\rangle + \langle M_b, R_a\rangle}
                       {\operatorname{tr}(M_a H_b M_a^\top) + \operatorname{tr}(M_b H_a M_b^\top)}.

    Parameters
    ----------
    steps, missed : two tensors (out, n)
        M and R of each half.
    hessians : two tensors (n, n)
        H of each half, symmetric positive semi-definite.
    """
    gain = cost = 0.0
    for step, other in ((0, 1), (1, 0)):
        gain += float((steps[step] * missed[other]).sum())
        cost += float(((steps[step] @ hessians[other]) * steps[step]).sum())
    return min(max(gain / cost, 0.0), 1.0) if cost > 0 else 0.0


def shrink_fisher(first: Tensor, second: Tensor, whole: Tensor) -> Tensor:
    r"""Return Fisher information shrunk towards a multiple of the identity, (n, n).

    .. math:: F \leftarrow a F + (1 - a) \mu I, \qquad
              a = \frac{\langle A - \mu_A I, B - \mu_B I\rangle}{\lVert F - \mu I\rVert^2} \in [0, 1], \qquad
              \mu = \tfrac1n \operatorname{tr} F.

    Parameters
    ----------
    first, second, whole : (n, n)
        A and B of the two halves of the examples, F of all, symmetric positive semi-definite.
    """
    a, b, f = (_less_mean(matrix) for matrix in (first, second, whole))
    norm = float(f.square().sum())
    weight = min(max(float((a * b).sum()) / norm, 0.0), 1.0) if norm > 0 else 0.0
    shrunk = weight * whole
    shrunk.diagonal().add_((1.0 - weight) * whole.diagonal().mean())
    return shrunk


def _less_mean(matrix: Tensor) -> Tensor:
    """Return a matrix less the mean of its diagonal times the identity."""
    found = matrix.clone()
    found.diagonal().sub_(matrix.diagonal().mean())
    return found
