r"""Published hand rules: from the statistics of layers to a shape and its amplitude.

A rule's sparsities at the mean sparsity S are :math:`\mu + a(S) z_i`, where :math:`\mu` is what the budget needs: the
shape z is in [0, 1], and the higher, the more is removed. Where a rule scores all layers alike, z is 0: uniform.
With min-max normalisation :math:`n(\cdot)` over the layers:

============ ================================================= ========================= =======================
rule         z                                                 a(S)                      source
============ ================================================= ========================= =======================
owl          1 - n(fraction of Wanda above 5 times the mean)   0.16                      Yin et al., ICML 2024
dlp          n(median of Wanda)                                0.08 0.2 0.3 at .5 .6 .7  Chen et al., ICML 2025
alphapruning n(power-law exponent of the weights' spectrum)    2eη, e = 0.3              Lu et al., NeurIPS 2024
erk          1 - density, :math:`\sim \sum d / \prod d`        what the densities span   Evci et al., ICML 2020
dsa          asin(atan(Var log Wanda)), kept in its domain     0.16                      Li et al., NeurIPS 2024
============ ================================================= ========================= =======================

Rules that know only depth, FLAP's and the dynamic programme are in ``fedlp.allocation.rules.allocate``.

Deviations
----------
The budget is met on the real costs, where the papers take an unweighted mean over blocks (OWL, DLP, DSA) or the
parameters of the matrices alone (AlphaPruning, ERK), and a layer here is what units are removed from, not a decoder
block. DLP's amplitude is that of its table, linear in between, and that of the nearest entry outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedlp.allocation.layer_metrics import Key, LayerStatistics, Vector, min_max
from fedlp.allocation.rules import dsa
from fedlp.errors import AllocationError

Shape = dict[str, float]
_OWL_AMPLITUDE = 0.16  # 2 λ
_DLP_SPARSITIES, _DLP_AMPLITUDES = (0.5, 0.6, 0.7), (0.08, 0.2, 0.3)  # 2 α
_ALPHA_SPREAD = 0.3
_T = TypeVar("_T")


@dataclass(frozen=True)
class Evidence:
    """What rules may look at.

    Attributes
    ----------
    statistics : sequence of LayerStatistics
        With Wanda's table for "owl" and "dlp".
    weights : mapping from layer name to sequence of array
        The readers' weights in their own shapes, (out, in) or (out, in, height, width); "alphapruning" and "erk".
    elements : mapping from layer name to array
        Wanda's elements; "dsa".
    """

    statistics: Sequence[LayerStatistics]
    weights: Mapping[str, Sequence[NDArray[np.floating]]] = field(default_factory=dict)
    elements: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)


def hand_rule(name: str, evidence: Evidence, sparsity: float) -> tuple[Shape, float]:
    """Return the shape of a rule of ``HAND_RULES``, in [0, 1], and its amplitude at a mean sparsity, >= 0.

    Raises
    ------
    AllocationError
        If there is no such rule, or it cannot look at what it needs; names rule and layer.
    """
    if name not in HAND_RULES:
        raise AllocationError(f"there is no allocation rule {name!r}; choose one of {' '.join(HAND_RULES)}")
    if not evidence.statistics:
        raise AllocationError(f"rule {name}: there are no layers to allocate to")
    return HAND_RULES[name](evidence, sparsity)


def _owl(evidence: Evidence, sparsity: float) -> tuple[Shape, float]:
    outliers = _column(evidence, "owl", ("wanda", "id", "outlier"))
    return _named(evidence, min_max([-value for value in outliers])), _OWL_AMPLITUDE


def _dlp(evidence: Evidence, sparsity: float) -> tuple[Shape, float]:
    medians = _column(evidence, "dlp", ("wanda", "id", "median"))
    return _named(evidence, min_max(medians)), float(np.interp(sparsity, _DLP_SPARSITIES, _DLP_AMPLITUDES))


def _alphapruning(evidence: Evidence, sparsity: float) -> tuple[Shape, float]:
    r"""Sparsities :math:`\eta (1 - e + 2 e z_i)`, with :math:`\eta` such that the parameters' mean is S."""
    exponents = []
    for layer in evidence.statistics:
        matrices = _needed(evidence.weights, "alphapruning", layer.name, "weights")
        exponents.append(
            float(np.mean([hill_exponent(np.reshape(w, (len(w), -1)), f"layer {layer.name}") for w in matrices]))
        )
    z = min_max(exponents)
    shares = np.array([layer.share for layer in evidence.statistics])
    eta = sparsity / float(np.average(1.0 - _ALPHA_SPREAD + 2.0 * _ALPHA_SPREAD * z, weights=shares))
    return _named(evidence, z), 2.0 * _ALPHA_SPREAD * eta


def _erk(evidence: Evidence, sparsity: float) -> tuple[Shape, float]:
    raw = []
    for layer in evidence.statistics:
        tensors = _needed(evidence.weights, "erk", layer.name, "weights")
        raw.append(sum(sum(w.shape) for w in tensors) / sum(w.size for w in tensors))
    shares = [layer.share for layer in evidence.statistics]
    removed = 1.0 - erk_densities(raw, shares, 1.0 - sparsity)
    return _named(evidence, min_max(removed)), float(removed.max() - removed.min())


def _dsa(evidence: Evidence, sparsity: float) -> tuple[Shape, float]:
    names = [layer.name for layer in evidence.statistics]
    elements = {name: _needed(evidence.elements, "dsa", name, "Wanda elements") for name in names}
    scores = dsa.chain_scores(dsa.parse_chain(dsa.PUBLISHED), elements)
    return _named(evidence, min_max([scores[name] for name in names])), dsa.AMPLITUDE


HAND_RULES: Mapping[str, Callable[[Evidence, float], tuple[Shape, float]]] = {
    "owl": _owl,
    "dlp": _dlp,
    "alphapruning": _alphapruning,
    "erk": _erk,
    "dsa": _dsa,
}


def hill_exponent(matrix: ArrayLike, where: str = "the matrix") -> float:
    r"""Return the power-law exponent of the spectrum of :math:`W W^\top` above its median (Hill's estimator).

    .. math:: \alpha = 1 + k \Big/ \sum_{i \le k} \ln(\lambda_i / \lambda_{\min}),

    over the k eigenvalues from the median :math:`\lambda_{\min}` upwards; the lower, the heavier the tail.

    Raises
    ------
    AllocationError
        If fewer than two eigenvalues differ; names ``where``.
    """
    values = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False) ** 2
    ordered = np.sort(values[values > values.max(initial=0.0) * 1e-12])
    tail = ordered[len(ordered) // 2 :]
    spread = float(np.log(tail / tail[0]).sum()) if tail.size else 0.0
    if spread <= 0.0:
        raise AllocationError(f"{where}: the spectrum of its weights has no tail; use another rule than alphapruning")
    return 1.0 + len(tail) / spread


def erk_densities(raw: Sequence[float], shares: Sequence[float], density: float) -> Vector:
    """Return densities in proportion to ``raw``, at most 1, whose mean weighted by ``shares`` is ``density``.

    Parameters
    ----------
    raw, shares : sequence of float
        > 0, one per layer; shares sum to 1.
    density : float
        In [0, 1].
    """
    scale, weight = np.asarray(raw, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    dense = np.zeros(len(scale), dtype=bool)
    while not dense.all():
        left = density * weight.sum() - weight[dense].sum()
        found = np.where(dense, 1.0, scale * left / (scale * weight)[~dense].sum())
        full = dense | (found >= 1.0)
        if (full == dense).all():
            return found
        dense = full
    return np.ones(len(scale))


def _column(evidence: Evidence, rule: str, key: Key) -> list[float]:
    for layer in evidence.statistics:
        if key not in layer.table:
            raise AllocationError(f"rule {rule}: layer {layer.name} has no {'.'.join(key)}; collect the leaf {key[0]}")
    return [layer.table[key] for layer in evidence.statistics]


def _needed(source: Mapping[str, _T], rule: str, layer: str, what: str) -> _T:
    if layer not in source:
        raise AllocationError(f"rule {rule}: layer {layer} came without {what}; give them")
    return source[layer]


def _named(evidence: Evidence, z: Vector) -> Shape:
    return {layer.name: float(value) for layer, value in zip(evidence.statistics, z, strict=True)}
