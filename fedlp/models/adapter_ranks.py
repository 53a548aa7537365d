r"""Rank self-pruning of HETLoRA (Cho et al., EMNLP 2024): the last ranks of a client's adapters are penalised and cut.

With r the client's rank, :math:`\gamma` the decay and :math:`s = \lfloor \gamma r \rfloor`, the tail is the ranks s to
r - 1. Training adds to the loss

.. math:: \lambda \sum_l \lVert B^l_{:, s:} \rVert_F \, \lVert A^l_{s:, :} \rVert_F ,

and where this sum is smaller after local training than before it, the client cuts the tail: its rank is s from then on.

Defaults: :math:`\gamma = 0.99` as re-implementations give the paper's; its :math:`\lambda` was not found in public
text, 0.01 is that of one re-implementation.

*Deviations*: all adapters of a client have one rank, so that the sum over layers decides; the paper has one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedlp.models.adapters import PARTS


def tail_start(rank: int, decay: float, least: int) -> int:
    """Return the rank that is left if the tail is cut: floor(decay rank), at least ``least``, at most ``rank``."""
    return min(rank, max(least, math.floor(decay * rank + 1e-9)))


def tail_norm(tensors: Mapping[str, Tensor], start: int) -> Tensor:
    """Return the sum over adapters of the product of the norms of the tails of B and A; a scalar.

    Parameters
    ----------
    tensors : mapping from name to Tensor
        A (ranks, in) and B (out, ranks) of every adapter; other tensors are ignored.
    start : int
        First rank of the tail.
    """
    found = torch.zeros(())
    for name, a in tensors.items():
        path, _, part = name.rpartition(".")
        if part == PARTS[0]:
            b = tensors[f"{path}.{PARTS[1]}"]
            norms = torch.linalg.vector_norm(b[:, start:]) * torch.linalg.vector_norm(a[start:])
            found = found.to(norms.device) + norms
    return found
