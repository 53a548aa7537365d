"""Settings of secure aggregation that server and clients share."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SecAggSettings:
    """Settings of secure aggregation.

    Attributes
    ----------
    threshold : float
        Fraction of a group whose shares open its sum, in (0.5, 1].
    min_group : int
        Updates without which no sum is opened, >= 2.
    bits : 32 or 64
        Of each masked value.
    value_range : float
        Largest absolute difference of a weight that is not clipped.
    by_examples : bool
        Whether a client weighs as many times as it has examples; else all weigh the same.
    phase_timeout_s : float
        Seconds that a phase without training waits for clients.
    """

    threshold: float = 0.6
    min_group: int = 3
    bits: int = 32
    value_range: float = 4.0
    by_examples: bool = True
    phase_timeout_s: float = 300.0

    def shares(self, group: int) -> int:
        """Return how many of a group's clients can open its sum: more than half, and never one."""
        return max(math.ceil(self.threshold * group - 1e-9), group // 2 + 1, 2)

    def least(self, group: int) -> int:
        """Return how many updates of a group's clients are needed for a sum."""
        return max(self.shares(group), self.min_group)
