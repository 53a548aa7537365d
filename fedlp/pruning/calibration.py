"""The examples that pruning may look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration examples: prepared inputs by batch, the flat labels of each batch, and a seed for random draws."""

    batches: Sequence[Tensor]
    labels: Sequence[Tensor]
    seed: int = 0

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return sum(len(batch) for batch in self.batches)
