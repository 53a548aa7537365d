"""Sweeps as Hydra runs them: direction of the objective, headers of jobs."""

from __future__ import annotations

from collections.abc import Iterable

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from fedlp.errors import ConfigError


def job_header() -> str:
    """Return number and overrides of a sweep's job; empty outside of sweeps."""
    config = HydraConfig.get()
    if config.mode != RunMode.MULTIRUN:
        return ""
    words = " ".join(word.lstrip("+") for word in config.overrides.task)
    return f"job {config.job.num} ({words}): "


def job_name() -> str:
    """Return the number of a sweep's job, which heads its lines where jobs run side by side."""
    config = HydraConfig.get()
    return f"job {config.job.num} " if config.mode == RunMode.MULTIRUN else ""


def sweep_direction(overrides: Iterable[str]) -> list[str]:
    """Return the override of Optuna's direction that follows the objective, unless the user sets one.

    Raises
    ------
    ConfigError
        If Optuna is asked for, but no objective.
    """
    chosen = dict(word.lstrip("+").partition("=")[::2] for word in overrides)
    if "optuna" not in chosen.get("hydra/sweeper", "") or "hydra.sweeper.direction" in chosen:
        return []
    if "objective" not in chosen:
        raise ConfigError("hydra/sweeper=optuna needs objective=METRIC, such as accuracy or loss")
    from fedlp.apps.sweep_jobs import direction_of

    return [f"hydra.sweeper.direction={direction_of(chosen['objective'])}"]
