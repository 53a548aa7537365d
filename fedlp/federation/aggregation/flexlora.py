r"""FlexLoRA (Bai et al., NeurIPS 2024): products of clients' adapters are averaged, and factorised by truncated SVD.

.. math:: \Delta = \frac{\sum_k w_k B_k A_k}{\sum_k w_k}, \qquad \Delta = U S V^\top, \qquad
   B \leftarrow U_{:, :r} S_{:r}, \quad A \leftarrow V_{:, :r}^\top

Ranks are sorted by singular value, so that a client's first :math:`r_k` are the best approximation of :math:`\Delta` of
its rank. Where clients hold slices of a layer, an entry is averaged over its holders.

*Deviations*: S goes to B alone, so that a rank with the singular value 0 can still be trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.federation.aggregation.adapter_updates import AdapterRule, AdapterUpdate, AdapterUpdates, adapter_names
from fedlp.registry import register


@register("aggregator", "flexlora")
@dataclass(frozen=True)
class FlexLora(AdapterRule):
    """Average of the products of clients' adapters, factorised by truncated SVD (FlexLoRA)."""

    def begin(self, params: Mapping[str, Tensor]) -> AdapterUpdates:
        """Return an accumulator, which holds the adapters of the round."""
        return _FlexLora(params, self.max_norm)


class _FlexLora(AdapterUpdates):
    def combine(self, path: str, updates: Sequence[AdapterUpdate]) -> dict[str, Tensor]:
        """Return the factors of the mean product, of the global rank."""
        a, b = self.before(path)
        left, values, right = torch.linalg.svd(self.mean_product(path, updates), full_matrices=False)
        count = min(len(a), len(values))
        signs = (
            left[:, :count].gather(0, left[:, :count].abs().argmax(dim=0, keepdim=True)).sign()
        )  # SVD leaves them open
        a, b = a.clone(), torch.zeros_like(b)
        a[:count], b[:, :count] = signs.T * right[:count], signs * left[:, :count] * values[:count]
        return dict(zip(adapter_names(path), (a, b), strict=True))
