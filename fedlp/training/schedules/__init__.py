"""Schedules of the learning rate, over rounds and within them.

A schedule is registered as ``@register("schedule", NAME)``: a frozen dataclass whose fields are its options, or a
function. Called with ``server_round``, ``num_rounds`` and ``progress``, it gives the factor of the learning rate.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from fedlp.errors import ConfigError, one_line
from fedlp.registry import lookup


class Schedule(Protocol):
    """Factor of the learning rate."""

    def __call__(self, server_round: int, num_rounds: int, progress: float) -> float:
        """Return the factor, finite and >= 0.

        Parameters
        ----------
        server_round : int
            The round, in [1, num_rounds].
        progress : float
            Share of the client's steps of this round that are done, in [0, 1).
        """


@dataclass(frozen=True, slots=True)
class Moment:
    """Position in a run: round ``server_round`` of ``num_rounds``."""

    server_round: int = 1
    num_rounds: int = 1


def make_schedule(chosen: str | Mapping[str, Any]) -> Schedule:
    """Return the schedule of a name, or of a mapping with ``name`` and options.

    Raises
    ------
    ConfigError
        If there is no such schedule, or an option does not fit.
    """
    values = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    name = values.pop("name", "constant")
    target = lookup("schedule", name)
    try:
        made = target(**values) if isinstance(target, type) else partial(target, **values)
        inspect.signature(made).bind(server_round=1, num_rounds=1, progress=0.0)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"local.schedule={name}: {one_line(error)}") from error
    return made


def lr_factor(schedule: Schedule, moment: Moment, progress: float) -> float:
    """Return a schedule's factor; ConfigError if it is negative or not finite."""
    factor = float(schedule(server_round=moment.server_round, num_rounds=moment.num_rounds, progress=progress))
    if not (math.isfinite(factor) and factor >= 0):
        raise ConfigError(
            f"local.schedule gives {factor} in round {moment.server_round}; it must be finite, at least 0"
        )
    return factor
