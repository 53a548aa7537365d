"""Cosine annealing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlp.errors import ConfigError
from fedlp.registry import register
from fedlp.training.schedules.warmup import warmup_factor


@register("schedule", "cosine")
@dataclass(frozen=True)
class Cosine:
    """Cosine annealing over all rounds, after a linear warm-up [1]_.

    Attributes
    ----------
    floor : float
        Factor at the end of the run, in [0, 1].
    warmup_rounds : int
        Rounds of linear warm-up before, >= 0.
    within_rounds : bool
        Whether the factor also changes from step to step; else it is that of the round's first step.

    References
    ----------
    .. [1] Loshchilov, Hutter: SGDR: Stochastic Gradient Descent with Warm Restarts. ICLR 2017.
    """

    floor: float = 0.0
    warmup_rounds: int = 0
    within_rounds: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"floor={self.floor} of the cosine schedule must be in [0, 1]")
        if self.warmup_rounds < 0:
            raise ConfigError(f"warmup_rounds={self.warmup_rounds} of the cosine schedule must be at least 0")

    def __call__(self, server_round: int, num_rounds: int, progress: float) -> float:
        """Return (1 + cos(pi t)) / 2, scaled to [floor, 1]; t goes from 0 in the first round after warm-up to 1."""
        done = server_round - 1 + (progress if self.within_rounds else 0.0)
        if done < self.warmup_rounds:
            return warmup_factor(server_round, self.warmup_rounds, progress, self.within_rounds)
        share = (done - self.warmup_rounds) / max(1, num_rounds - self.warmup_rounds)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
