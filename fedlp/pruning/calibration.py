"""Calibration examples of pruning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration examples.

    Attributes
    ----------
    batches : sequence of Tensor
        Prepared inputs.
    labels : sequence of Tensor
        Target of each prediction of a batch: (n,) classes or tokens, or (n, ...) values.
    seed : int
        Seeds random draws.
    loss : callable
        Mean loss of outputs, (n, outputs), and labels.
    shift_invariant : bool
        Whether a constant added to all outputs of an example changes nothing, as with the logits of one softmax.
    """

    batches: Sequence[Tensor]
    labels: Sequence[Tensor]
    seed: int = 0
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    shift_invariant: bool = True

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return sum(len(batch) for batch in self.batches)
