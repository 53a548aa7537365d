"""Check of evaluations before a run: clients must hold examples out, and rounds must end with a global model."""

from __future__ import annotations

import logging

from fedlp.config import RunConfig
from fedlp.errors import ConfigError

log = logging.getLogger("fedlp")


def check_evaluation(config: RunConfig) -> None:
    """Raise ConfigError, with the remedy, if evaluation on clients is impossible."""
    name = config.evaluation.name
    if name != "central" and not config.dataset.client_test_fraction:
        raise ConfigError(
            f"evaluation={name} needs examples that clients hold out: set dataset.client_test_fraction, such as 0.2"
        )
    if config.dataset.on_devices and config.dataset.server is None:
        _check_without_test_set(config)


def _check_without_test_set(config: RunConfig) -> None:
    """Raise ConfigError if the server needs a test set that it lacks."""
    evaluation = config.evaluation
    wants = {
        "evaluation=both": evaluation.name == "both",
        "evaluation.tiers=true": evaluation.tiers,
    }
    if asking := next((option for option, is_set in wants.items() if is_set), None):
        raise ConfigError(f"{asking} needs a test set of the server: set dataset.server=PATH")
    if evaluation.name == "central":
        log.warning("no model is evaluated: set dataset.server=PATH, or evaluation=clients with what devices hold out")


def refuse_simulation(config: RunConfig) -> None:
    """Raise ConfigError for simulated clients with devices' own data."""
    if config.dataset.on_devices:
        raise ConfigError(
            "dataset.on_devices=true is for SuperNodes, each with data of its own (docs/deployment.md); a simulation "
            "divides one data set: leave it out"
        )
