"""Check of evaluations before a run: clients must hold examples out, and rounds must end with a global model."""

from __future__ import annotations

from fedlp.config import RunConfig
from fedlp.errors import ConfigError


def check_evaluation(config: RunConfig) -> None:
    """Raise ConfigError, with the remedy, where clients are to evaluate but could not."""
    name = config.evaluation.name
    if name != "central" and not config.dataset.client_test_fraction:
        raise ConfigError(
            f"evaluation={name} needs examples that clients hold out: set dataset.client_test_fraction, such as 0.2"
        )
    if name != "central" and config.strategy.name == "oneshot":
        raise ConfigError("strategy=oneshot evaluates on the server's test set alone: choose evaluation=central")
