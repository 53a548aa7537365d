"""Robust aggregation, entry by entry in float64: what the fast rules are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def trimmed_mean(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    cut = math.floor(fraction * len(ordered))
    kept = ordered[cut : len(ordered) - cut]
    return sum(kept) / len(kept)


def norms(updates: Sequence[Array], old: Array) -> list[float]:
    """Root mean squares of the differences over the entries that are held (not NaN)."""
    found = []
    for update in updates:
        held = ~np.isnan(update)
        found.append(float(np.sqrt(np.mean((update[held] - old[held]) ** 2))))
    return found


def lower_median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def clipped(updates: Sequence[Array], weights: Sequence[float], old: Array, multiple: float) -> Array:
    sizes, bound = norms(updates, old), 0.0
    bound = multiple * lower_median(sizes)
    most = multiple * lower_median(weights)
    result = old.copy()
    for entry in range(len(old)):
        above = below = 0.0
        for update, weight, size in zip(updates, weights, sizes, strict=True):
            if not np.isnan(update[entry]):
                scale = min(1.0, bound / size) if size else 1.0
                above += min(weight, most) * scale * (update[entry] - old[entry])
                below += min(weight, most)
        if below:
            result[entry] += above / below
    return result


def krum_choice(updates: Sequence[Array], hostile: float, selected: float) -> list[int]:
    count = len(updates)
    distances = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            common = ~np.isnan(updates[i]) & ~np.isnan(updates[j])
            distances[i, j] = np.mean((updates[i][common] - updates[j][common]) ** 2)
    near = max(1, count - math.ceil(hostile * count) - 2)
    scores = [sum(sorted(distances[i][j] for j in range(count) if j != i)[:near]) for i in range(count)]
    return sorted(range(count), key=lambda i: (scores[i], i))[: max(1, math.floor(selected * count))]


Parts = dict[str, Array]  # by tensor, NaN where an update holds nothing


def bounded(updates: Sequence[Parts], weights: Sequence[float], old: Parts, multiple: float, least: int) -> Parts:
    """Average of updates whose norms are bounded by a multiple of a typical update's of the same tensors."""
    typical, whole = {}, {}
    for name, before in old.items():
        holders = [update[name] for update in updates if not np.isnan(update[name]).all()]
        if len(holders) >= least:
            typical[name] = lower_median([norms([values], before)[0] ** 2 for values in holders])
            whole[name] = lower_median([np.nansum((values - before) ** 2) for values in holders])
    ratios = []
    for update in updates:
        norm = reference = 0.0
        for name, before in old.items():
            count = 0
            for entry, value in enumerate(update[name]):
                if name in typical and not np.isnan(value):
                    norm += (value - before[entry]) ** 2
                    count += 1
            if count:
                reference += max(count * typical[name], whole[name])
        ratios.append(math.sqrt(norm / reference) if reference > 0 else 0.0)
    logs = [math.log(ratio) for ratio in ratios if ratio > 0]
    deviations = [abs(value - lower_median(logs)) for value in logs]
    limit = max(multiple, math.exp(3 * 1.4826 * lower_median(deviations))) if logs else multiple
    scales = [limit / ratio if ratio > limit else 1.0 for ratio in ratios]
    result = {}
    for name, before in old.items():
        result[name] = before.copy()
        for entry in range(len(before)):
            held = [i for i, update in enumerate(updates) if not np.isnan(update[name][entry])]
            if held:
                steps = [weights[i] * scales[i] * (updates[i][name][entry] - before[entry]) for i in held]
                result[name][entry] += sum(steps) / sum(weights[i] for i in held)
    return result
