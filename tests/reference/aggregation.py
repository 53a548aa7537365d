"""The coverage average as one would write it down: float64, one mask per entry, nothing streamed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.types import Keep

Array = NDArray[np.float64]


def coverage_average(
    params: Mapping[str, Tensor], updates: Iterable[tuple[Mapping[str, Tensor], Mapping[str, tuple[Keep, ...]], float]]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the averages, not yet rounded to their dtypes, and the total weight behind every entry."""
    sums = {name: np.zeros(tensor.shape) for name, tensor in params.items()}
    weights = {name: np.zeros(tensor.shape) for name, tensor in params.items()}
    for values, keeps, weight in updates:
        for name, tensor in values.items():
            where = np.ix_(*(keep.indices() for keep in keeps[name])) if name in keeps else ...
            sums[name][where] += weight * as_float64(tensor)
            weights[name][where] += weight
    averages = {}
    for name, tensor in params.items():
        averages[name] = as_float64(tensor).copy()
        covered = weights[name] > 0
        averages[name][covered] = sums[name][covered] / weights[name][covered]
    return averages, weights


def as_float64(tensor: Tensor) -> Array:
    return np.asarray(tensor.to(torch.float64).numpy())
