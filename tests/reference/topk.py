"""Top-k sparsification as one would write it down: float64, one entry after another."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def top_k(matrix: Array, fraction: Fraction) -> Array:
    """Return what arrives of a matrix: its largest entries as plus or minus one of two sizes, zeros elsewhere."""
    entries = sorted(np.ndindex(matrix.shape), key=lambda place: -abs(matrix[place]))
    chosen = entries[: math.ceil(fraction * matrix.size)]
    middle = math.fsum(abs(matrix[place]) for place in chosen) / len(chosen)
    large = [place for place in chosen if abs(matrix[place]) >= middle]
    found = np.zeros(matrix.shape)
    for group in (large, [place for place in chosen if place not in large]):
        if group:
            size = math.fsum(abs(matrix[place]) for place in group) / len(group)
            for place in group:
                found[place] = math.copysign(size, matrix[place])
    return found
