"""Direction of improvement of a metric, by its name in the records of rounds."""

from __future__ import annotations

from fedlp import registry
from fedlp.errors import ConfigError
from fedlp.tasks.base import Task

LOSSES = ("loss", "train_loss")


def larger_is_better(name: str, task: Task | None = None) -> bool:
    """Return whether a larger value of a metric is better.

    Parameters
    ----------
    name : str
        A metric's label, "loss" or "train_loss"; a name that contains a label, such as "clients_accuracy_worst", has
        the direction of that label.
    task : Task, optional
        Task whose metrics are known; all registered metrics if absent.

    Raises
    ------
    ConfigError
        If no metric has the name; lists the known ones.
    """
    known = _directions(task)
    if name in known:
        return known[name]
    for label in sorted(known, key=len, reverse=True):
        if label in name:
            return known[label]
    raise ConfigError(f"{name} is no metric of this run; choose one of {', '.join(known)}")


def _directions(task: Task | None) -> dict[str, bool]:
    """Return the direction of every metric by label, the losses last."""
    if task is None:
        measures = [registry.lookup("metric", name)() for name in registry.names("metric")]
    else:
        measures = list(task.measures())
    return {measure.label: bool(measure.larger_is_better) for measure in measures} | dict.fromkeys(LOSSES, False)
