r"""AlphaPruning (Lu et al., NeurIPS 2024): layers with a lighter-tailed spectrum are pruned more.

.. math:: s_i = \eta (1 - e + 2 e z_i), \qquad e = 0.3, \qquad z = n(\text{power-law exponent of the spectrum}),

with :math:`\eta` such that the parameters' mean is S; the amplitude is :math:`2 e \eta`.

Deviations
----------
The budget is met on the real costs, where the paper takes the parameters of the matrices alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fedlp.allocation.budget.solve import Cost, allocate_shape
from fedlp.allocation.evidence import Evidence
from fedlp.allocation.layer_metrics import min_max
from fedlp.allocation.ranges import check_amplitude
from fedlp.errors import AllocationError
from fedlp.registry import register
from fedlp.types import PrunableLayer

_SPREAD = 0.3


@register("allocator", "alphapruning")
@dataclass(frozen=True)
class AlphaPruning:
    """Higher sparsity for layers with a lighter-tailed spectrum (AlphaPruning).

    Attributes
    ----------
    amplitude : float or None
        Range of the sparsities over the layers, in [0, 2]; the published one if None.
    """

    amplitude: float | None = None

    needs = frozenset({"weights"})

    def __post_init__(self) -> None:
        check_amplitude(self.amplitude)

    def __call__(self, layers: Sequence[PrunableLayer], evidence: Evidence, cost: Cost, limit: float) -> dict[str, int]:
        """Return the units kept of each layer."""
        exponents = []
        for layer in layers:
            matrices = [w.reshape(len(w), -1) for w in evidence.weights[layer.name]]
            exponents.append(float(np.mean([hill_exponent(w, f"layer {layer.name}") for w in matrices])))
        z = min_max(exponents)
        shares = np.array([layer.num_params for layer in layers], dtype=np.float64)
        eta = evidence.sparsity / float(np.average(1.0 - _SPREAD + 2.0 * _SPREAD * z, weights=shares))
        shape = {layer.name: float(value) for layer, value in zip(layers, z, strict=True)}
        rise = 2.0 * _SPREAD * eta if self.amplitude is None else self.amplitude
        return allocate_shape(layers, shape, rise, cost, limit)


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
