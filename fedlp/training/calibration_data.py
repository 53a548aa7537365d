"""Calibration examples, prepared and in batches, and the pruning method of a config."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlp.config import PrunerConfig
from fedlp.data.examples import DataInfo, Examples
from fedlp.pruning.calibration import Calibration
from fedlp.pruning.reader_layers import Method
from fedlp.pruning.scores.criterion import as_score
from fedlp.tasks import task_of


def make_method(pruner: PrunerConfig) -> Method:
    """Return the pruning method of a config."""
    return Method(
        score=as_score(pruner.make()),
        recovery=pruner.recovery,  # type: ignore[arg-type] # validated
        centred=pruner.centred,
        correction=pruner.correction,
        fisher=pruner.fisher,
        damping=pruner.damping,
        keeps_batch_norm=pruner.keeps_batch_norm,
    )


def whole_examples(examples: Examples, info: DataInfo) -> Examples:
    """Return the examples that calibration may use: all images, of text for language modelling only whole windows."""
    return task_of(info).whole(examples)


def batch_calibration(
    chosen: Examples, info: DataInfo, batch_size: int, seed: int, device: torch.device
) -> Calibration:
    """Return examples, prepared and in batches; ``seed`` is that of what pruning draws."""
    task = task_of(info)
    batches: list[Tensor] = []
    labels: list[Tensor] = []
    for inputs, targets in task.calibration_batches(chosen, batch_size):
        batches.append(task.prepare_whole(inputs, info, device))
        labels.append(task.labels(inputs, targets).to(device))
    if task.is_softmax:
        return Calibration(batches, labels, seed)
    return Calibration(batches, labels, seed, lambda outputs, wanted: task.loss(outputs, outputs, wanted), False)
