"""Blockwise quantisation by the definition: entry by entry, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def blockwise(
    values: NDArray[np.float64], scales: Sequence[float], block: int, levels: Sequence[float]
) -> NDArray[np.float64]:
    """Return the values with every entry replaced by the nearest level times the scale of its block."""
    flat = values.ravel()
    found = np.zeros_like(flat)
    for j, value in enumerate(flat):
        scale = scales[j // block]
        candidates = [scale * level for level in levels]
        found[j] = min(candidates, key=lambda candidate: abs(candidate - value))
    return found.reshape(values.shape)


def block_scales(values: NDArray[np.float64], block: int) -> list[float]:
    """Return the largest magnitude of each block of consecutive entries."""
    flat = values.ravel()
    return [float(np.abs(flat[start : start + block]).max()) for start in range(0, len(flat), block)]
