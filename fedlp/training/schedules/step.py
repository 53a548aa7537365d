"""Step decay."""

from __future__ import annotations

from dataclasses import dataclass

from fedlp.errors import ConfigError
from fedlp.registry import register


@register("schedule", "step")
@dataclass(frozen=True)
class Step:
    """Learning rate that is multiplied by ``gamma`` every ``every`` rounds.

    Attributes
    ----------
    every : int
        Rounds between two changes, >= 1.
    gamma : float
        Factor of one change, in (0, 1].
    """

    every: int = 10
    gamma: float = 0.5

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"every={self.every} of the step schedule must be at least 1")
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"gamma={self.gamma} of the step schedule must be in (0, 1]")

    def __call__(self, server_round: int, num_rounds: int, progress: float) -> float:
        """Return gamma to the power of the changes so far."""
        return float(self.gamma ** ((server_round - 1) // self.every))
