"""Linear warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from fedlp.errors import ConfigError
from fedlp.registry import register


@register("schedule", "warmup")
@dataclass(frozen=True)
class Warmup:
    """Linear warm-up, then a constant learning rate.

    Attributes
    ----------
    rounds : int
        Rounds of warm-up, >= 1; the last of them has the full learning rate.
    within_rounds : bool
        Whether the factor also changes from step to step.
    """

    rounds: int = 5
    within_rounds: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds} of the warmup schedule must be at least 1")

    def __call__(self, server_round: int, num_rounds: int, progress: float) -> float:
        """Return the share of the warm-up that is done, at most 1."""
        return warmup_factor(server_round, self.rounds, progress, self.within_rounds)


def warmup_factor(server_round: int, rounds: int, progress: float, within_rounds: bool) -> float:
    """Return the factor of a linear warm-up, in [0, 1]: r / rounds in round r, or by steps within it."""
    done = server_round - 1 + progress if within_rounds else float(server_round)
    return min(1.0, done / rounds)
