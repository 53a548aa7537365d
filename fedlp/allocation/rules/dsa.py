r"""DSA (Li et al., NeurIPS 2024): an allocation function from the statistics of layers to their sparsity.

Without a file it is the published chain, :math:`\operatorname{asin}(\operatorname{atan}(\operatorname{Var}
\log M))` of Wanda's metric M, with the amplitude :math:`2 \Lambda = 0.16`; with one, the function that
``fedlp-search`` wrote there.

Deviations
----------
Those of :mod:`fedlp.allocation.dsa_chains`; the budget is met on the real costs, where the paper takes an unweighted
mean over blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedlp import registry
from fedlp.allocation import dsa_chains
from fedlp.allocation.budget.solve import Cost, allocate_shape
from fedlp.allocation.evidence import Evidence
from fedlp.allocation.files import read_mapping
from fedlp.allocation.layer_metrics import min_max
from fedlp.allocation.ranges import check_amplitude
from fedlp.allocation.search.expressions import Expression, evaluate
from fedlp.errors import AllocationError
from fedlp.registry import register
from fedlp.types import PrunableLayer


@register("allocator", "dsa")
@dataclass(frozen=True)
class Dsa:
    """Allocation function of layer statistics: DSA's published chain, or one found by fedlp-search.

    Attributes
    ----------
    path : str or None
        File of ``fedlp-search``; the published chain if None.
    amplitude : float or None
        Range of the sparsities over the layers, in [0, 2]; 0.16, or the file's, if None.
    """

    path: str | None = None
    amplitude: float | None = None

    def __post_init__(self) -> None:
        check_amplitude(self.amplitude)

    @cached_property
    def _stored(self) -> dict[str, Any]:
        stored = {} if self.path is None else read_mapping(self.path)
        rules = registry.names("allocator")
        if self.path is not None and "function" not in stored and stored.get("rule") not in rules:
            raise AllocationError(f"allocator.path={self.path} has neither a function nor a rule of {' '.join(rules)}")
        return stored

    @property
    def needs(self) -> frozenset[str]:
        """Evidence that the function reads."""
        if "function" in self._stored:
            return frozenset({"model"})
        if "rule" in self._stored:
            return registry.lookup("allocator", str(self._stored["rule"]))().needs  # type: ignore[no-any-return]
        return frozenset({"weights", "input_norms"})

    def __call__(self, layers: Sequence[PrunableLayer], evidence: Evidence, cost: Cost, limit: float) -> dict[str, int]:
        """Return the units kept of each layer."""
        if "function" in self._stored:
            function = Expression.from_config(self._stored)
            found = evaluate(function, evidence.statistics)
            rise = function.amplitude_at(evidence.sparsity)
        elif "rule" in self._stored:
            rule = registry.lookup("allocator", str(self._stored["rule"]))()
            return rule(layers, evidence, cost, limit)  # type: ignore[no-any-return]
        else:
            scores = dsa_chains.chain_scores(dsa_chains.parse_chain(dsa_chains.PUBLISHED), evidence.wanda)
            z = min_max([scores[layer.name] for layer in layers])
            found = {layer.name: float(value) for layer, value in zip(layers, z, strict=True)}
            rise = dsa_chains.AMPLITUDE
        return allocate_shape(layers, found, rise if self.amplitude is None else self.amplitude, cost, limit)
