"""Operations of DSA's chains, from vectors to vectors, with the meaning of the authors' code.

Vectors keep their dtype. Values outside the reals become NaN or infinite, as in that code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Step = Callable[[Array], Array]


class DomainError(ValueError):
    """Input outside an operation's domain."""


def _normalize(x: Array) -> Array:
    scaled = (x - x.mean()) / _std(x)
    return np.where(np.isnan(scaled), 0, scaled).astype(x.dtype)


def _var(x: Array) -> Array:
    return np.atleast_1d(x.var(ddof=1) if x.size > 1 else np.full((), np.nan, dtype=x.dtype))


def _std(x: Array) -> Array:
    return np.sqrt(_var(x))


def _entropy(x: Array) -> Array:
    """Return the entropy, in nats, of the non-negative elements; probabilities are clipped away from 0 and 1."""
    valid = x[x >= 0]
    if not valid.size:
        return np.full(1, np.nan, dtype=x.dtype)
    chances = valid / valid.sum()
    if not np.isfinite(chances).all():
        raise DomainError("ENTROPY has no probabilities to take: its elements are all zero, or too large")
    margin = np.finfo(x.dtype).eps
    return np.atleast_1d(-(chances * np.log(np.clip(chances, margin, 1 - margin))).sum())


def geometric_mean_by_logs(x: Array) -> Array:
    """Return the product's n-th root without computing the product; nan if that is negative."""
    if np.isnan(x).any() or (x == 0).any():
        return np.full(1, np.nan if np.isnan(x).any() else 0.0)
    negative = (x < 0).sum() % 2 == 1
    return np.atleast_1d(np.nan if negative else np.exp(np.log(np.abs(x)).mean()))


def _matrix_only(x: Array) -> Array:
    raise DomainError("it takes a matrix")


MATRIX_ONLY = ("GRAM", "CORREF", "DIAGONAL", "DETERMINANT", "RANK", "SLOGDET")

STICKS: dict[str, Step] = {
    "NO_OP": lambda x: x,
    "ABS": np.abs,
    "LOG": lambda x: np.log(np.where(x <= 0, 1, x).astype(x.dtype) + x.dtype.type(1e-6)),
    "ABSLOG": lambda x: np.log(np.abs(np.where(x == 0, 1, x))).astype(x.dtype),
    "POW": np.square,
    "EXP": np.exp,
    "NORMALIZE": _normalize,
    "SIGMOID": lambda x: 1 / (1 + np.exp(-x)),
    "TANH": np.tanh,
    "MMS": lambda x: (x - x.min()) / (x.max() - x.min() + x.dtype.type(1e-9)),
}

DEFORMS: dict[str, Step] = {
    "NO_OP": lambda x: x,
    "GRAM": _matrix_only,
    "CORREF": _matrix_only,
    "DIAGONAL": _matrix_only,
    "FROBENIUS_NORM": lambda x: np.atleast_1d(np.sqrt(np.square(x).sum())),
    "L1_NORM": lambda x: np.atleast_1d(np.abs(x).mean()),
    "DETERMINANT": _matrix_only,
    "RANK": _matrix_only,
    "GEOMETRIC_MEAN": lambda x: np.atleast_1d(np.prod(x) ** x.dtype.type(1.0 / x.size)),
    "MEAN": lambda x: np.atleast_1d(x.mean()),
    "VAR": _var,
    "STD": _std,
    "SLOGDET": _matrix_only,
    "ENTROPY": _entropy,
}

POSTS: dict[str, Step] = {
    "NO_OP": lambda x: x,
    "SIN": np.sin,
    "COS": np.cos,
    "TAN": np.tan,
    "ASIN": np.arcsin,
    "ACOS": np.arccos,
    "ATAN": np.arctan,
    "EXP": np.exp,
    "LOG": np.log,
    "ABS": np.abs,
    "SIGMOID": lambda x: 1 / (1 + np.exp(-x)),
    "TANH": np.tanh,
    "SOFTPLUS": lambda x: np.logaddexp(x.dtype.type(0), x),
}
