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
            Fraction of the Hessian's mean diagonal entry; None for ``DAMPING``.
        layer : str
            Named in errors.

        Raises
        ------
        CalibrationError
            As :func:`~fedlp.pruning.kernels.hessian.invert_hessian` does.
        """
        x = self.rows.to(torch.float64)
        if centred:
            x = x - x.mean(dim=0)
        x = x * math.sqrt(2.0 / len(x))
        count, size = x.shape
        damping = DAMPING if damping is None else damping
        ridge = damping * float(x.square().sum()) / size
        if not ridge and damping:  # constant inputs: their units are free, in order of magnitude
            ridge = LEAST_RIDGE
        if count >= size or not ridge:
            return invert_hessian(x.T @ x, damping, layer, count).to(torch.float32)
        return LowRankInverse.of(x.T, ridge, torch.float32)
