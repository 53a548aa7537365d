"""Second moments of a layer's inputs: the Hessian of its squared output error.

Sums, not means: the moments of two data sets add up to those of their union, wherever they were collected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.errors import CalibrationError

_RANK_TOLERANCE = 1e-9  # eigenvalues below this fraction of the largest count as zero, in an error message
_ROWS = 2048  # input vectors whose products are added up in their own dtype
_FEWEST_ROWS = 256  # in float32; fewer take no time
_PANEL = 512  # columns per panel of the Gram matrix; of two symmetric panels only one is computed


@dataclass(slots=True)
class Moments:
    """Running sums over input vectors x of one layer, and optionally over target outputs t.

    Attributes
    ----------
    count : int
        Vectors seen.
    total : (n,)
        Sum of x.
    gram : (n, n)
        Sum of x xᵀ; only the lower triangle, by panels, is kept up to date.
    target_total : (out,) or None
        Sum of t.
    cross : (out, n) or None
        Sum of t xᵀ.
    """

    count: int
    total: Tensor
    gram: Tensor
    target_total: Tensor | None = None
    cross: Tensor | None = None

    @classmethod
    def empty(
        cls, size: int, targets: int = 0, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> Moments:
        """Return empty moments, for ``size`` inputs and ``targets`` target outputs (0 for none)."""
        total = torch.zeros(size, dtype=dtype, device=device)
        gram = total.new_zeros(size, size)
        if not targets:
            return cls(0, total, gram)
        return cls(0, total, gram, total.new_zeros(targets), total.new_zeros(targets, size))

    def add(self, inputs: Tensor, targets: Tensor | None = None) -> None:
        """Add (tokens, n) inputs, and (tokens, out) targets if targets are collected; any float dtype.

        Products of many inputs are taken in the dtype of the inputs, less their means, and added up in that of the
        sums: means that are large beside what varies cost no digits.
        """
        self.count += len(inputs)
        for start in range(0, len(inputs), _ROWS):
            rows = slice(start, start + _ROWS)
            if inputs.dtype == torch.float32 and len(inputs) >= _FEWEST_ROWS:
                self._add_centred(inputs[rows], None if targets is None else targets[rows])
            else:
                self._add_exactly(inputs[rows], None if targets is None else targets[rows])

    def _add_exactly(self, inputs: Tensor, targets: Tensor | None) -> None:
        x = inputs.to(self.gram.dtype)
        self._add_panels(x)
        self.total += x.sum(dim=0)
        if self.cross is not None and self.target_total is not None:
            assert targets is not None
            t = targets.to(self.cross.dtype)
            self.cross.addmm_(t.T, x)
            self.target_total += t.sum(dim=0)

    def _add_centred(self, inputs: Tensor, targets: Tensor | None) -> None:
        dtype, count = self.gram.dtype, len(inputs)
        origin = inputs.mean(dim=0)
        x = inputs - origin
        self._add_panels(x)
        shift, rest = origin.to(dtype), x.sum(dim=0, dtype=dtype)
        # the sum of x xᵀ of the inputs is that of their differences and rank two
        self.gram.addr_(rest + count * shift, shift).addr_(shift, rest)
        total = rest + count * shift
        self.total += total
        if self.cross is not None and self.target_total is not None:
            assert targets is not None
            aim = targets.to(inputs.dtype)
            middle = aim.mean(dim=0)
            t = aim - middle
            self.cross += t.T @ x
            left = t.sum(dim=0, dtype=dtype)
            self.cross.addr_(left, shift).addr_(middle.to(dtype), total)
            self.target_total += left + count * middle.to(dtype)

    def _add_panels(self, x: Tensor) -> None:
        """Add the products of some rows, (rows, n), to the lower triangle."""
        for start in range(0, x.shape[1], _PANEL):
            stop = start + _PANEL
            left, right = x[:, start:].T, x[:, start:stop]
            if x.dtype == self.gram.dtype:
                self.gram[start:, start:stop].addmm_(left, right)
            else:
                self.gram[start:, start:stop] += left @ right

    def include(self, other: Moments) -> None:
        """Add the moments of another data set."""
        self.count += other.count
        self.total += other.total
        self.gram += other.gram
        if self.target_total is not None and other.target_total is not None:
            self.target_total += other.target_total
        if self.cross is not None and other.cross is not None:
            self.cross += other.cross

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the union of two disjoint data sets."""
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.gram + other.gram,
            None if self.target_total is None or other.target_total is None else self.target_total + other.target_total,
            None if self.cross is None or other.cross is None else self.cross + other.cross,
        )

    def __sub__(self, other: Moments) -> Moments:
        """Return the moments of a data set less a part of it."""
        return Moments(
            self.count - other.count,
            self.total - other.total,
            self.gram - other.gram,
            None if self.target_total is None or other.target_total is None else self.target_total - other.target_total,
            None if self.cross is None or other.cross is None else self.cross - other.cross,
        )

    def shifted(self, by: Tensor) -> Moments:
        """Return the moments of inputs less a vector (n,), of the same targets."""
        gram = torch.addr(self.gram, by, self.total, alpha=-1.0)
        gram.addr_(self.total, by, alpha=-1.0).addr_(by, by, alpha=self.count)
        cross = self.cross
        if cross is not None and self.target_total is not None:
            cross = torch.addr(cross, self.target_total, by, alpha=-1.0)
        return Moments(self.count, self.total - self.count * by, gram, self.target_total, cross)

    @property
    def mean(self) -> Tensor:
        """Mean of each input, (n,)."""
        return self.total / self.count

    @property
    def square_mean(self) -> Tensor:
        """Mean square of each input, (n,)."""
        return self.gram.diagonal() / self.count

    @property
    def variance(self) -> Tensor:
        """Variance of each input, (n,), >= 0."""
        return (self.square_mean - self.mean.square()).clamp_(min=0.0)

    def hessian(self, centred: bool) -> Tensor:
        r"""Return :math:`H = \frac{2}{N}\sum x x^\top`, (n, n), of inputs less their mean if ``centred``.

        Centring is equivalent to a constant input that is never removed: the means of removed inputs then go into a
        bias, and cost nothing (the Schur complement of the constant).
        """
        matrix = self.gram.tril() + self.gram.tril(-1).T
        if centred:
            rounding = 32 * torch.finfo(matrix.dtype).eps * matrix.diagonal().mean()
            matrix.addr_(self.total, self.mean, alpha=-1.0)
            matrix.diagonal().add_(rounding * len(matrix))  # inputs that are almost constant leave nothing else
        return matrix.mul_(2.0 / self.count)

    def target_hessian(self, centred: bool) -> Tensor:
        r"""Return :math:`\frac{2}{N}\sum t x^\top`, (out, n), of both less their means if ``centred``."""
        assert self.cross is not None
        assert self.target_total is not None
        matrix = self.cross.clone()
        if centred:
            matrix.addr_(self.target_total, self.mean, alpha=-1.0)
        return matrix.mul_(2.0 / self.count)

    @property
    def target_mean(self) -> Tensor:
        """Mean target, (out,)."""
        assert self.target_total is not None
        return self.target_total / self.count


@dataclass(slots=True)
class DiagonalMoments:
    """Running sums over input vectors x of one layer, for what reads no more than their means and squares.

    Attributes
    ----------
    count : int
        Vectors seen.
    total, squares : (n,)
        Sums of x and of x².
    """

    count: int
    total: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, size: int, device: torch.device | str = "cpu") -> DiagonalMoments:
        """Return empty sums, float64."""
        total = torch.zeros(size, dtype=torch.float64, device=device)
        return cls(0, total, total.clone())

    def add(self, inputs: Tensor, targets: Tensor | None = None) -> None:
        """Add (tokens, n) inputs; any float dtype."""
        for rows in torch.split(inputs, _ROWS):
            x = rows.to(self.total.dtype)
            self.total += x.sum(dim=0)
            self.squares += x.square_().sum(dim=0) if x is not rows else x.square().sum(dim=0)
        self.count += len(inputs)

    @property
    def mean(self) -> Tensor:
        """Mean of each input, (n,)."""
        return self.total / self.count

    @property
    def square_mean(self) -> Tensor:
        """Mean square of each input, (n,)."""
        return self.squares / self.count

    @property
    def variance(self) -> Tensor:
        """Variance of each input, (n,), >= 0."""
        return (self.square_mean - self.mean.square()).clamp_(min=0.0)

    def hessian(self, centred: bool) -> Tensor:
        """Raise CalibrationError: the Hessian was not collected."""
        raise CalibrationError("a score reads second moments without saying so: add 'moments' to its needs")


def invert_hessian(hessian: Tensor, damping: float, layer: str, count: int) -> Tensor:
    r"""Return the inverse of :math:`H + \lambda\,\overline{\operatorname{diag} H}\,I`, (n, n), as below."""
    return torch.cholesky_inverse(factor_hessian(hessian, damping, layer, count))


def factor_hessian(hessian: Tensor, damping: float, layer: str, count: int) -> Tensor:
    r"""Return the Cholesky factor of :math:`H + \lambda\,\overline{\operatorname{diag} H}\,I`, (n, n), lower.

    Parameters
    ----------
    hessian : (n, n)
        Symmetric positive semi-definite; not modified. The factor has its dtype.
    damping : float
        :math:`\lambda`, a fraction of the mean diagonal entry, >= 0.
    layer : str
        Named in errors.
    count : int
        Input vectors behind the Hessian, named in errors.

    Raises
    ------
    CalibrationError
        If the damped Hessian is not positive definite or not finite; names layer, rank and remedy.
    """
    size = len(hessian)
    if not bool(torch.isfinite(hessian.diagonal()).all()):  # which bounds all the rest
        raise CalibrationError(
            f"layer {layer}: its inputs are not finite on the calibration data; check the model and the data"
        )
    damped, mean = hessian.clone(), hessian.diagonal().mean()
    damped.diagonal().add_(damping * torch.where(mean > 0, mean, 1.0))  # inputs that are constant: any will do
    factor, info = torch.linalg.cholesky_ex(damped)
    too_few = damping == 0.0 and count < size  # rounding may hide it from the factorisation
    if too_few or int(info):
        rank = int(torch.linalg.matrix_rank(hessian.to(torch.float64), rtol=_RANK_TOLERANCE, hermitian=True))
        rank = min(rank, count)  # more is rounding: of sums in float32, such as those that clients send
        raise CalibrationError(
            f"layer {layer}: the Hessian of its {size} inputs has rank {rank}, from {count} calibration vectors; "
            f"give at least {size} independent ones (calibration.examples), or damp it (pruner.damping=0.01)"
        )
    found: Tensor = factor
    return found


def any_root(matrix: Tensor) -> Tensor:
    """Return the quickest matrix R with RᵀR equal to a positive semi-definite one."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return square_root(matrix) if int(info) else factor.T


def square_root(matrix: Tensor) -> Tensor:
    """Return a matrix R with RᵀR equal to a positive semi-definite one."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = values.clamp(min=0.0).sqrt()[:, None] * vectors.T
    return root
