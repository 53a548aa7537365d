"""Sample of a layer's input vectors: statistics as of moments, and a cheap inverse Hessian for few vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedlp.pruning.kernels.hessian import Moments, invert_hessian
from fedlp.pruning.kernels.inverses import LowRankInverse

DAMPING = 0.01  # where none is asked for: samples are small
SINGLE_DAMPING = 1e-3  # from which on a Hessian is inverted in float32
LEAST_RIDGE = 1e-9  # of a Hessian that is zero


@dataclass(frozen=True)
class SampledRows:
    """Some input vectors of one layer; ``rows`` is (vectors, n), any float dtype."""

    rows: Tensor

    @property
    def count(self) -> int:
        """Number of vectors."""
        return len(self.rows)

    @cached_property
    def moments(self) -> Moments:
        """Second moments of the sample, float64."""
        moments = Moments.empty(self.rows.shape[1], device=self.rows.device)
        moments.add(self.rows)
        return moments

    @property
    def mean(self) -> Tensor:
        """Mean of each input, (n,), float64."""
        return self.moments.mean

    @property
    def square_mean(self) -> Tensor:
        """Mean square of each input, (n,), float64."""
        return self.moments.square_mean

    @property
    def variance(self) -> Tensor:
        """Variance of each input, (n,), float64, >= 0."""
        return self.moments.variance

    def hessian(self, centred: bool) -> Tensor:
        """Return the Hessian, (n, n), float64, as :meth:`Moments.hessian` does."""
        return self.moments.hessian(centred)

    def inverse_hessian(self, centred: bool, damping: float | None, layer: str) -> Tensor | LowRankInverse:
        """Return the inverse of the damped Hessian, (n, n), float32: its damping conditions it well.

        Parameters
        ----------
        damping : float or None
            Fraction of the Hessian's mean diagonal entry. None for ``DAMPING`` and, of fewer vectors than columns,
            shrinkage towards the diagonal by how far two halves of the sample agree.
        layer : str
            Named in errors.

        Raises
        ------
        CalibrationError
            As :func:`~fedlp.pruning.kernels.hessian.invert_hessian` does.
        """
        count, size = self.rows.shape
        is_wide, shrinks = count < size, damping is None
        damping = DAMPING if damping is None else damping
        x = self.rows.to(torch.float64 if is_wide or damping < SINGLE_DAMPING else torch.float32)
        if centred:
            x = x - x.mean(dim=0)
        x = x * math.sqrt(2.0 / count)
        ridge = damping * float(x.square().sum(dtype=torch.float64)) / size
        if not ridge and damping:  # constant inputs: their units are free, in order of magnitude
            ridge = LEAST_RIDGE
        if not is_wide or not ridge:
            return invert_hessian(x.T @ x, damping, layer, count).to(torch.float32)
        if shrinks and count > 1:
            scale = (x.square().sum(dim=0) + LEAST_RIDGE * ridge).sqrt()
            x = x / scale
            weight = min(row_weight(x), 1.0 - damping)
            return LowRankInverse.of(math.sqrt(weight) * x.T, 1.0 - weight, torch.float32, scale)
        return LowRankInverse.of(x.T, ridge, torch.float32)


def row_weight(rows: Tensor) -> float:
    r"""Return the weight of a Hessian :math:`X^\top X` in its shrinkage towards its diagonal, from X alone; in [0, 1].

    That of :func:`~fedlp.pruning.kernels.shrinkage.hessian_weight`, where the halves are every other vector.

    Parameters
    ----------
    rows : (vectors, n)
        X, of columns of norm 1 or 0; at least two vectors.
    """
    halves = [rows[0::2] * math.sqrt(len(rows) / len(rows[0::2])), rows[1::2] * math.sqrt(len(rows) / len(rows[1::2]))]
    first, second, whole = (part.square().sum(dim=0) for part in (*halves, rows))
    norm = float((rows @ rows.T).square().sum() - whole.square().sum())
    product = float((halves[0] @ halves[1].T).square().sum() - first @ second)
    return min(max(product / norm, 0.0), 1.0) if norm > 0 else 0.0
