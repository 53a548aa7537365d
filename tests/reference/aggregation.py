"""Averages as one would write them down: float64, entry by entry, nothing streamed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from itertools import product

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


def trimmed_mean(
    params: Mapping[str, Tensor],
    updates: Iterable[tuple[Mapping[str, Tensor], Mapping[str, tuple[Keep, ...]]]],
    fraction: Fraction,
) -> dict[str, Array]:
    """Return the coordinate-wise trimmed means, not yet rounded to their dtypes, entry by entry."""
    held: dict[str, dict[tuple[int, ...], list[float]]] = {name: {} for name in params}
    for values, keeps in updates:
        for name, tensor in values.items():
            rows = [keep.indices().tolist() for keep in keeps[name]] if name in keeps else map(range, tensor.shape)
            for place, value in zip(product(*rows), as_float64(tensor).ravel().tolist(), strict=True):
                held[name].setdefault(place, []).append(value)
    found = {name: as_float64(tensor).copy() for name, tensor in params.items()}
    for name, entries in held.items():
        for place, values in entries.items():
            cut = math.floor(fraction * len(values))
            found[name][place] = math.fsum(sorted(values)[cut : len(values) - cut]) / (len(values) - 2 * cut)
    return found


def as_float64(tensor: Tensor) -> Array:
    return np.asarray(tensor.to(torch.float64).numpy())
