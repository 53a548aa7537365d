"""Tasks: training loss, reported metrics, and preparation of batches for a model.

A task is a class, registered as ``@register("task", NAME)``, whose fields are its options; see :class:`Task`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from fedlp.data.examples import DataInfo
from fedlp.errors import ConfigError
from fedlp.registry import lookup
from fedlp.tasks.auto import Auto
from fedlp.tasks.base import Sums, Task, add_sums

__all__ = ["Sums", "Task", "add_sums", "make_task", "task_of", "with_task"]


def make_task(name: str, **values: Any) -> Task:
    """Return the task of a name, or of ``module:object``, with these options.

    Raises
    ------
    ConfigError
        If there is no such task, a value is out of range, or it is no subclass of :class:`Task`.
    """
    task = lookup("task", name)(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    )
    if not isinstance(task, Task):
        raise ConfigError(f"task={name} must be a subclass of fedlp.tasks.Task; it gives a {type(task).__name__}")
    return task


def with_task(info: DataInfo, task: object) -> DataInfo:
    """Return the facts of a data set with the task of a config.

    Parameters
    ----------
    task : object
        A task, or :class:`fedlp.tasks.auto.Auto` for the task of the data set's targets.

    Raises
    ------
    ConfigError
        If the task's options or the kind of its targets do not fit the data set.
    """
    own = task_of(info)
    chosen = own if isinstance(task, Auto) else task
    if not isinstance(chosen, Task):
        raise ConfigError(f"a task must be a subclass of fedlp.tasks.Task; this is a {type(chosen).__name__}")
    if chosen.targets and own.targets and chosen.targets != own.targets:
        raise ConfigError(f"the task needs {chosen.targets}, but the data set {info.name} has {own.targets}")
    found = info if isinstance(task, Auto) else replace(info, task=chosen)
    chosen.check(found)
    chosen.measures()
    return found


def task_of(info: DataInfo) -> Task:
    """Return the task of a data set: its own task object, or the named task with default options."""
    return _default(info.task) if isinstance(info.task, str) else info.task


_default = lru_cache(maxsize=16)(make_task)
