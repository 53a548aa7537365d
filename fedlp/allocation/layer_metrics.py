r"""Statistics of a layer's elements, one table for all allocation rules.

A layer's elements come as three *leaves*, each an array of numbers >= 0:

========= =============================== =================================================
magnitude :math:`|W_{ij}|`                of the matrices that read the layer's units
wanda     :math:`|W_{ij}| \sqrt{E x_j^2}` Sun et al., ICLR 2024
saliency  loss increase of each unit      optimal brain surgeon, ``fedlp.pruning.kernels.obs``
========= =============================== =================================================

An element-wise ``pre`` step, then a reduction to one number: all are total, so that finite elements give finite
numbers. Entropies are relative to that of equal elements, so that the layer's size does not count; quantiles are
elements. The table is computed once, and searches work on it alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedlp.errors import AllocationError
from fedlp.types import PrunableLayer

Leaf = Literal["magnitude", "wanda", "saliency"]
Pre = Literal["id", "log", "sqrt", "sq"]
Reduce = Literal["mean", "std", "var", "cv", "entropy", "outlier", "p99", "logmean", "median"]
Key = tuple[Leaf, Pre, Reduce]
Vector = NDArray[np.float64]

LEAVES: tuple[Leaf, ...] = get_args(Leaf)
PRES: tuple[Pre, ...] = get_args(Pre)
REDUCES: tuple[Reduce, ...] = get_args(Reduce)
LOG_FLOOR = 1e-12  # smaller elements count as this one where a logarithm is taken
_LARGEST = 1e50  # larger elements count as this one: the variance of their squares is still finite
_OUTLIER = 5.0  # times the mean (OWL's m)


def is_defined(pre: Pre, reduce: Reduce) -> bool:
    """Return whether a reduction is in the table after a ``pre``; logmean is only after "id", being a mean of logs."""
    return reduce != "logmean" or pre == "id"


KEYS: tuple[Key, ...] = tuple(
    (leaf, pre, reduce) for leaf in LEAVES for pre in PRES for reduce in REDUCES if is_defined(pre, reduce)
)


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Statistics of one prunable layer for allocation rules.

    Attributes
    ----------
    table : mapping from (leaf, pre, reduce) to float
        One number per reduction in ``KEYS``, finite; only of the leaves that were given.
    depth : float
        Relative position in the network, in [0, 1].
    share : float
        Of the parameters of all prunable layers, in (0, 1].
    sensitivity : float
        KL divergence from the dense model, in nats per label, with this layer alone pruned; nan if not measured.
    curve : float
        Its sparsity by error curves (``allocator=dp``) at a mean sparsity of one half; nan without curves.
    """

    name: str
    table: Mapping[Key, float]
    depth: float
    share: float
    sensitivity: float = math.nan
    curve: float = math.nan


def compute_statistics(
    layers: Sequence[PrunableLayer],
    elements: Mapping[str, Mapping[Leaf, NDArray[np.floating]]],
    sensitivity: Mapping[str, float] | None = None,
    curve: Mapping[str, float] | None = None,
) -> tuple[LayerStatistics, ...]:
    """Return the statistics of each layer, in the order of ``layers``.

    Parameters
    ----------
    elements : mapping from layer name to leaf to array
        Elements of any shape; of a layer with several readers, of all of them.
    sensitivity, curve : mapping from layer name to float, optional
        As in :class:`LayerStatistics`, where measured.

    Raises
    ------
    AllocationError
        If a layer has no elements, or negative or non-finite ones; names layer and leaf.
    """
    whole = sum(layer.num_params for layer in layers)
    found = []
    for layer in layers:
        table: dict[Key, float] = {}
        for leaf, values in elements[layer.name].items():
            where = f"layer {layer.name}: {leaf}"
            table |= {(leaf, pre, reduce): x for (pre, reduce), x in _reduce_all(values, where).items()}
        measured = math.nan if sensitivity is None else float(sensitivity[layer.name])
        bent = math.nan if curve is None else float(curve[layer.name])
        found.append(LayerStatistics(layer.name, table, layer.depth, layer.num_params / whole, measured, bent))
    return tuple(found)


def outlier_fraction(elements: ArrayLike, where: str) -> float:
    """Return the fraction of elements above 5 times their mean: ``table["wanda", "id", "outlier"]`` of Wanda's metric.

    Raises
    ------
    AllocationError
        If there are no elements, or negative or non-finite ones; names ``where``.
    """
    values = _checked(elements, where)
    return float(np.mean(values > _OUTLIER * values.mean()))


def wanda_elements(weight: ArrayLike, mean_square: ArrayLike) -> Vector:
    r"""Return :math:`|W_{ij}| \sqrt{E x_j^2}`, (out, n), of a matrix (out, n) and its inputs' mean squares (n,)."""
    return np.abs(np.asarray(weight, dtype=np.float64)) * np.sqrt(np.asarray(mean_square, dtype=np.float64))


def _reduce_all(elements: ArrayLike, where: str) -> dict[tuple[Pre, Reduce], float]:
    values = _checked(elements, where)
    quantiles = _quantiles(values)
    return {(pre, reduce): x for pre in PRES for reduce, x in _reductions(values, quantiles, pre).items()}


def _checked(elements: ArrayLike, where: str) -> Vector:
    values = np.asarray(elements, dtype=np.float64).ravel()
    if not values.size:
        raise AllocationError(f"{where} has no elements; a layer needs at least one unit")
    if not np.isfinite(values).all() or values.min() < 0:
        raise AllocationError(f"{where} has elements that are negative or not finite; check the weights and the data")
    return np.minimum(values, _LARGEST)


def _apply(values: Vector, pre: Pre) -> Vector:
    match pre:
        case "log":
            return np.log(np.maximum(values, LOG_FLOOR))
        case "sqrt":
            return np.sqrt(values)
        case "sq":
            return np.square(values)
        case "id":
            return values


def _quantiles(values: Vector) -> Vector:
    """Return the elements at the median and the 99 % quantile; every ``pre`` is increasing, so they stay the same."""
    return np.quantile(values, [0.5, 0.99], method="higher")


def _reductions(elements: Vector, quantiles: Vector, pre: Pre) -> dict[Reduce, float]:
    """Return all reductions that are defined after ``pre``."""
    values = _apply(elements, pre)
    median, p99 = _apply(quantiles, pre).tolist()
    mean = float(values.mean())
    var = float(np.square(values - mean).mean())
    found: dict[Reduce, float] = {
        "mean": mean,
        "std": math.sqrt(var),
        "var": var,
        "cv": _ratio(math.sqrt(var), abs(mean)),
        "entropy": _entropy(np.abs(values)),
        "outlier": float(np.mean(values > _OUTLIER * mean)),
        "p99": p99,
        "median": median,
    }
    return found | {"logmean": float(_apply(elements, "log").mean())} if is_defined(pre, "logmean") else found


def _ratio(above: float, below: float) -> float:
    return min(above / below, _LARGEST) if below > above / _LARGEST else 0.0


def _entropy(values: Vector) -> float:
    """Return the entropy of ``values`` as probabilities, relative to that of equal ones: in [0, 1]; 0 for all zeros."""
    top = float(values.max())
    if values.size == 1 or top == 0.0:
        return 0.0
    scaled = values[values > 0] / top
    scaled = scaled[scaled > 0]
    total = float(scaled.sum())
    entropy = math.log(total) - float((scaled * np.log(scaled)).sum()) / total
    return min(max(entropy / math.log(values.size), 0.0), 1.0)


# ------------------------------------------------------------------------------------------------------ over the layers
def min_max(values: ArrayLike) -> Vector:
    """Return values shifted and scaled to [0, 1]; all 0 if they are equal."""
    vector = np.asarray(values, dtype=np.float64)
    shifted = vector - vector.min()
    top = shifted.max()
    return shifted / top if top > 0 else np.zeros_like(shifted)


def ranks(values: ArrayLike) -> Vector:
    """Return ranks scaled to [0, 1], equal values sharing one; all 0.5 if they are equal."""
    vector = np.asarray(values, dtype=np.float64)
    if vector.size == 1:
        return np.full(1, 0.5)
    below = (vector[None, :] < vector[:, None]).sum(axis=1)
    equal = (vector[None, :] == vector[:, None]).sum(axis=1)
    return np.asarray((below + 0.5 * (equal - 1)) / (vector.size - 1), dtype=np.float64)
