"""Constant learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from fedlp.registry import register


@register("schedule", "constant")
@dataclass(frozen=True)
class Constant:
    """Constant learning rate."""

    def __call__(self, server_round: int, num_rounds: int, progress: float) -> float:
        """Return 1."""
        return 1.0
