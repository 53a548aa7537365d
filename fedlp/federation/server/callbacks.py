"""Callbacks: functions that are called after each round, and may end the run.

A callback is a function of ``record`` and ``state``, or a class whose fields are its options, registered as
``@register("callback", NAME)``; see :class:`Callback`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedlp.errors import ConfigError
from fedlp.federation.server.checkpoint import ServerState
from fedlp.registry import register
from fedlp.tasks import Task
from fedlp.tasks.direction import larger_is_better
from fedlp.types import RoundRecord


class Callback(Protocol):
    """Function that is called after each round.

    A class may also have ``recall(records)``, which is called once before a stopped run goes on, with the records of
    its earlier rounds, and answers as a call does. A class with a field ``task`` is given the run's task.
    """

    def __call__(self, record: RoundRecord, state: ServerState) -> bool | None:
        """Return True to end the run after this round.

        Parameters
        ----------
        record : RoundRecord
            The finished round; ``record.metrics`` has test metrics where the round was evaluated.
        state : ServerState
            The model (``state.params``, not to be written to) and all other memory between rounds.
        """


@register("callback", "early_stopping")
@dataclass
class EarlyStopping:
    """End of the run when a metric has not improved in several evaluations.

    Attributes
    ----------
    metric : str or None
        Name in the records; the first metric of the task if absent.
    patience : int
        Evaluations without an improvement after which the run ends, >= 1.
    min_delta : float
        Smallest improvement that counts, >= 0.
    """

    metric: str | None = None
    patience: int = 5
    min_delta: float = 0.0
    task: Task | None = field(default=None, repr=False)
    _best: float = field(default=math.nan, init=False, repr=False)
    _waited: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ConfigError(f"early_stopping: patience={self.patience} is not allowed: it must be at least 1")
        if not 0 <= self.min_delta < math.inf:
            raise ConfigError(f"early_stopping: min_delta={self.min_delta} is not allowed: it must be at least 0")
        self._name = self.metric or (first_metric(self.task) if self.task is not None else "loss")
        self._rises = larger_is_better(self._name, self.task)

    def __call__(self, record: RoundRecord, state: ServerState) -> bool:
        """Return whether patience is exhausted; a non-finite value is no improvement."""
        return self._note(record)

    def recall(self, records: Sequence[RoundRecord]) -> bool:
        """Return the answer of the last of the earlier rounds."""
        return any([self._note(record) for record in records][-1:])

    def _note(self, record: RoundRecord) -> bool:
        value = record.metrics.get(self._name)
        if value is None:
            return False
        if is_better(value, self._best, self._rises, self.min_delta):
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        return self._waited >= self.patience


def first_metric(task: Task) -> str:
    """Return the main metric of a run: the task's first, "loss" if it has none."""
    return next((metric.label for metric in task.measures()), "loss")


def is_better(value: float, best: float, rises: bool, least: float = 0.0) -> bool:
    """Return whether a value improves on the best one by more than ``least``; NaN means no value yet."""
    if not math.isfinite(value):
        return False
    if math.isnan(best):
        return True
    return value - best > least if rises else best - value > least
