"""Persistence of rounds: record and checkpoint, best model, callbacks; final check of the run."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlp.config import CallbackConfig, RunConfig
from fedlp.config.parts import read_part
from fedlp.errors import ConfigError, FedLPError, TrainingError, one_line
from fedlp.federation.server.callbacks import is_better
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.report import load_run
from fedlp.tasks import Task
from fedlp.tasks.direction import larger_is_better
from fedlp.types import RoundRecord

log = logging.getLogger("fedlp")


class RoundKeeper:
    """Observer that persists a run: record and checkpoint per round, best model; it calls callbacks.

    Parameters
    ----------
    directory : RunDirectory
    config : RunConfig
    task : Task
        Gives metrics their direction.
    budget : callable, optional
        A further callback, named ``privacy.max_epsilon``.

    Raises
    ------
    ConfigError
        If there is no such callback or metric.
    """

    def __init__(
        self, directory: RunDirectory, config: RunConfig, task: Task, budget: Callable[..., Any] | None = None
    ) -> None:
        self._directory, self._config = directory, config
        self._callbacks = make_callbacks(config, task)
        if budget is not None:
            self._callbacks.append(("privacy.max_epsilon", budget))
        self._best = None if config.keep_best is None else BestModel(directory, config.keep_best, task)
        self.stopped_by = ""

    def recall(self) -> bool:
        """Read back the recorded rounds of a resumed run; return whether a callback ends it."""
        found = [(name, getattr(callback, "recall", None)) for name, callback in self._callbacks]
        recalls = [(name, recall) for name, recall in found if recall is not None]
        if self._best is None and not recalls:
            return False  # nobody asks for what may be gigabytes
        records = load_run(self._directory.path).rounds
        if self._best is not None:
            self._best.recall(records)
        for name, recall in recalls:
            if self._ask(name, "recall", recall, records):
                self.stopped_by = name
        return bool(self.stopped_by)

    def __call__(self, record: RoundRecord, state: ServerState) -> bool:
        """Persist a finished round; return whether a callback ends the run."""
        self._directory.append_round(record)
        if self._best is not None:
            self._best(record, state)
        for name, callback in self._callbacks:
            if self._ask(name, f"round {record.server_round}", callback, record, state):
                self.stopped_by = name
        due = record.server_round % self._config.checkpoint_every == 0
        if due or self.stopped_by or record.server_round == self._config.num_rounds:
            self._directory.save_state(state)
        return bool(self.stopped_by)

    def results(self) -> dict[str, Any]:
        """Return the entry in the manifest."""
        found: dict[str, Any] = {"stopped_by": self.stopped_by} if self.stopped_by else {}
        if self._best is not None:
            found["best"] = self._best.result()
        return found

    def _ask(self, name: str, where: str, callback: Callable[..., object], *arguments: object) -> bool:
        """Return a callback's answer; FedLPError if it fails, ConfigError for an invalid answer."""
        try:
            answer = callback(*arguments)
        except FedLPError:
            raise
        except Exception as error:
            text = f"callback {name} failed in {where}: {type(error).__name__}: {one_line(error)}"
            raise FedLPError(f"{text}; mend it, then go on with: fedlp resume={self._directory.path}") from error
        if answer is not None and not isinstance(answer, bool | np.bool_):
            kind = type(answer).__name__
            raise ConfigError(f"callback {name} returned a {kind}; it must return True to end the run, or nothing")
        return bool(answer)


class BestModel:
    """Best model by a metric, as ``model-best.safetensors``; the earliest of equal rounds.

    Raises
    ------
    ConfigError
        If there is no such metric.
    """

    def __init__(self, directory: RunDirectory, metric: str, task: Task) -> None:
        self._directory, self._metric = directory, metric
        self._rises = _direction("keep_best", metric, task)
        self._value, self._round = math.nan, 0

    def recall(self, records: Sequence[RoundRecord]) -> None:
        """Find the best of the earlier rounds, whose model is on disk."""
        for record in records:
            self._note(record)

    def __call__(self, record: RoundRecord, state: ServerState) -> None:
        """Write the model if its metric is the best so far."""
        if self._note(record):
            self._directory.save_model(state, "model-best.safetensors")

    def result(self) -> dict[str, Any]:
        """Return metric, value and round; warns if no round had a finite value."""
        if not self._round:
            log.warning("keep_best=%s: no round has a finite value, so there is no best model", self._metric)
            return {"metric": self._metric, "value": None, "server_round": None}
        return {"metric": self._metric, "value": self._value, "server_round": self._round}

    def _note(self, record: RoundRecord) -> bool:
        value = record.metrics.get(self._metric)
        if value is None or not is_better(value, self._value, self._rises):
            return False
        self._value, self._round = value, record.server_round
        return True


def make_callbacks(config: RunConfig, task: Task) -> list[tuple[str, Callable[..., Any]]]:
    """Return the config's callbacks with their names; ConfigError for an invalid one."""
    made = []
    for chosen in config.callbacks:
        part = read_part(CallbackConfig, "callbacks", {"name": chosen} if isinstance(chosen, str) else chosen)
        is_class = isinstance(part.target, type)
        try:
            callback = part.make(task=task) if is_class else part.make() if part.options else part.target
        except (TypeError, ValueError) as error:
            raise ConfigError(f"callbacks={part.name}: {one_line(error)}") from error
        if not callable(callback):
            raise ConfigError(f"callbacks={part.name} must be called with (record, state), but its objects cannot be")
        made.append((part.name, callback))
    return made


def check_metrics(config: RunConfig, task: Task) -> None:
    """Raise ConfigError, before anything is loaded, for a metric or callback that does not exist."""
    make_callbacks(config, task)
    for option in ("keep_best", "objective"):
        if (name := getattr(config, option)) is not None:
            _direction(option, name, task)


def _direction(option: str, metric: str, task: Task) -> bool:
    try:
        return larger_is_better(metric, task)
    except ConfigError as error:
        raise ConfigError(f"{option}={error}") from error


# ---- the verdict
def check_trained(manifest: Mapping[str, Any], out: Path) -> None:
    """Warn of rounds that left the model unchanged.

    Raises
    ------
    TrainingError
        If all rounds did; names the most frequent reason.
    """
    good, rounds = manifest["totals"].get("good_rounds"), manifest["totals"].get("rounds")
    if good is None or not rounds or good == rounds:
        return
    failures = [failure for record in load_run(out).rounds for failure in record.failures]
    reasons = Counter(failure.reason for failure in failures).most_common(1)
    why = ""
    if reasons:
        example = next(failure for failure in failures if failure.reason == reasons[0][0])
        why = f"; {len(failures)} updates failed, most of them {reasons[0][0]}, such as: {example.message}"
    if not good:
        raise TrainingError(f"nothing was trained: no round of {rounds} had a good update{why}")
    log.warning("%d of %d rounds had no good update and left the model as it was%s", rounds - good, rounds, why)
