"""Tasks: the loss that is minimised, the metrics that are reported, and how a batch is prepared for a model.

A task is a class, registered as ``@register("task", NAME)``, whose fields are its options; see :class:`Task`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fedlp.data.examples import DataInfo
from fedlp.errors import ConfigError
from fedlp.registry import lookup
from fedlp.tasks.base import Sums, Task, add_sums

__all__ = ["Sums", "Task", "add_sums", "make_task", "task_of"]


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


def task_of(info: DataInfo) -> Task:
    """Return the task of a data set: the one that it holds, or the one of that name with its default options."""
    return _default(info.task) if isinstance(info.task, str) else info.task


_default = lru_cache(maxsize=16)(make_task)
