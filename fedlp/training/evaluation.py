"""Evaluation: sums over ranges of examples, and the metrics of such sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fedlp.data.examples import DataInfo, Examples
from fedlp.models import ModelTask, forward_logits
from fedlp.tasks import Sums, Task, add_sums, make_task, task_of


@torch.inference_mode()
def evaluate_sums(
    model: nn.Module, examples: Examples, info: DataInfo, batch_size: int, start: int = 0, stop: int | None = None
) -> Sums:
    """Return the sums of the task's loss and metrics over examples ``start`` to ``stop``.

    Sums add up over disjoint ranges; with range borders at multiples of ``batch_size`` the total does not depend on how
    the examples were divided.
    """
    task, device = task_of(info), next(model.parameters()).device
    model.eval()
    total: Sums = {"loss": 0.0, "count": 0.0}
    end = len(examples) if stop is None else stop
    for begin in range(start, end, batch_size):
        inputs, targets = examples.rows(begin, min(begin + batch_size, end))
        outputs = forward_logits(model, task.prepare(inputs, info, device))
        total = add_sums((total, task.sums(outputs, inputs, targets)))
    return total


def metrics_from_sums(sums: Mapping[str, float | list[float]], task: Task | ModelTask | str) -> dict[str, float]:
    """Return the task's metrics and its mean ``loss`` from sums over at least one prediction.

    Parameters
    ----------
    task : Task or str
        The task, or its name.
    """
    found = make_task(task) if isinstance(task, str) else task
    assert isinstance(found, Task)
    return found.summarize(sums)
