r"""HETLoRA (Cho et al., EMNLP 2024): adapters of several ranks, zero-padded, averaged by the norms of their products.

.. math:: A \leftarrow \frac{\sum_k \omega_k \operatorname{pad}(A_k)}{\sum_k \omega_k}, \quad
   B \leftarrow \frac{\sum_k \omega_k \operatorname{pad}(B_k)}{\sum_k \omega_k}, \qquad
   \omega_k = w_k \lVert B_k A_k \rVert_F

Zeros stand in place of the ranks that a client does not hold (``sparsity-weighted aggregation``); a client gets the
first :math:`r_k` ranks (truncation). Where clients hold slices of a layer, rows of B and columns of A are averaged over
their holders.

*Deviations*: norms are those of a layer, not of all; they multiply the weights w of the examples (the paper's are
equal: ``aggregator.weighting=equal``). Ranks that no client of a round holds keep their values: zeros in A and B at
once would never be trained again. Rank self-pruning, by which clients lower their ranks, is an option of adapters
(``adapter.self_pruning=true``, :mod:`fedlp.models.adapter_ranks`); without it ranks are the fleet's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.federation.aggregation.adapter_updates import AdapterRule, AdapterUpdate, AdapterUpdates, adapter_names
from fedlp.registry import register


@register("aggregator", "hetlora")
@dataclass(frozen=True)
class HetLora(AdapterRule):
    """Average of clients' adapters, zero-padded to the largest rank, by the norms of their products (HETLoRA)."""

    def begin(self, params: Mapping[str, Tensor]) -> AdapterUpdates:
        """Return an accumulator, which holds the adapters of the round."""
        return _HetLora(params, self.max_norm)


class _HetLora(AdapterUpdates):
    def combine(self, path: str, updates: Sequence[AdapterUpdate]) -> dict[str, Tensor]:
        """Return the weighted averages of zero-padded factors; the plain weights where all products are zero."""
        a, b = self.before(path)
        weights = [update.weight * float(product_norm(update)) for update in updates]
        if not sum(weights):
            weights = [update.weight for update in updates]
        sums = torch.zeros_like(a), torch.zeros_like(b)
        masses = torch.zeros_like(a[0]), torch.zeros_like(b[:, 0])
        for update, weight in zip(updates, weights, strict=True):
            ranks = torch.arange(len(update.a))
            sums[0][ranks[:, None], update.columns[None, :]] += weight * update.a
            sums[1][update.rows[:, None], ranks[None, :]] += weight * update.b
            masses[0][update.columns] += weight
            masses[1][update.rows] += weight
        tiny = torch.finfo(torch.float64).tiny
        new_a = torch.where(masses[0] > 0, sums[0] / masses[0].clamp(min=tiny), a)
        new_b = torch.where(masses[1][:, None] > 0, sums[1] / masses[1].clamp(min=tiny)[:, None], b)
        held = max(len(update.a) for update in updates)
        new_a[held:], new_b[:, held:] = a[held:], b[:, held:]
        return dict(zip(adapter_names(path), (new_a, new_b), strict=True))


def product_norm(update: AdapterUpdate) -> Tensor:
    """Return the Frobenius norm of B A, from Gram matrices of the ranks' size."""
    return ((update.b.T @ update.b) * (update.a @ update.a.T)).sum().clamp(min=0.0).sqrt()
