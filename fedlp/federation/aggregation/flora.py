r"""FLoRA (Wang et al., NeurIPS 2024): clients' adapters are stacked, which sums their products without error.

.. math:: W \leftarrow W + \frac{\alpha}{r} \frac{\sum_k w_k B_k A_k}{\sum_k w_k}
   = W + \frac{\alpha}{r} \, [p_1 B_1 \cdots p_K B_K] \, [A_1; \dots; A_K], \qquad B \leftarrow 0

The base takes up the stacked product after every round, and adapters start anew. The base, although frozen on clients,
is therefore another in every round and travels to every client of it; the bytes are counted.

*Deviations*: the server merges and sends the base; the paper sends the stacked adapters, of the sum of the ranks, which
clients merge. A starts from its values of before the round, not from new random ones. Where clients hold slices of a
layer, an entry is averaged over its holders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.federation.aggregation.adapter_updates import AdapterRule, AdapterUpdate, AdapterUpdates, adapter_names
from fedlp.registry import register


@register("aggregator", "flora")
@dataclass(frozen=True)
class Flora(AdapterRule):
    """Sum of the products of clients' stacked adapters, merged into the base after every round (FLoRA).

    Attributes
    ----------
    adapter_scale : float
        Scale of a product, alpha / rank of the adapters, > 0.
    """

    adapter_scale: float = 1.0

    def begin(self, params: Mapping[str, Tensor]) -> AdapterUpdates:
        """Return an accumulator, which holds the adapters of the round."""
        return _Flora(params, self.max_norm, self.adapter_scale)


class _Flora(AdapterUpdates):
    def __init__(self, params: Mapping[str, Tensor], max_norm: float | None, scale: float) -> None:
        super().__init__(params, max_norm)
        self._scale = scale

    def combine(self, path: str, updates: Sequence[AdapterUpdate]) -> dict[str, Tensor]:
        """Return the base with the mean product, and adapters that start anew."""
        a, b = self.before(path)
        name = f"{path}.weight"
        weight = self.params[name].to(torch.float64) + self._scale * self.mean_product(path, updates)
        return {name: weight, **dict(zip(adapter_names(path), (a, torch.zeros_like(b)), strict=True))}
