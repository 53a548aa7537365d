"""Calibration examples, prepared and in batches, and the pruning method of a config."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedlp.config import PrunerConfig
from fedlp.data.examples import DataInfo, Examples
from fedlp.errors import CalibrationError
from fedlp.pruning.calibration import Calibration
from fedlp.pruning.kernels.newton import mean_loss
from fedlp.pruning.reader_layers import Method
from fedlp.pruning.scores.criterion import as_score
from fedlp.tasks import task_of

_MOST_EXCESS = 1.0  # nats per token above those of a uniform guess; a model with fresh weights has about 0.1


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
    """Return the examples for calibration: all images; of text for language modelling only whole windows."""
    return task_of(info).whole(examples)


def batch_calibration(
    chosen: Examples, info: DataInfo, batch_size: int, seed: int, device: torch.device
) -> Calibration:
    """Return examples, prepared and in batches; ``seed`` is that of pruning's draws."""
    task = task_of(info)
    batches: list[Tensor] = []
    labels: list[Tensor] = []
    for inputs, targets in task.calibration_batches(chosen, batch_size):
        batches.append(task.prepare_whole(inputs, info, device))
        labels.append(task.labels(inputs, targets).to(device))
    if task.is_softmax:
        return Calibration(batches, labels, seed)
    return Calibration(batches, labels, seed, lambda outputs, wanted: task.loss(outputs, outputs, wanted), False)


def check_tokenizer(model: nn.Module, data: Calibration, info: DataInfo, tokenizer: str) -> None:
    """Check a language model's loss on one example, which tells a wrong tokenizer; CalibrationError if it is far off.

    Models that predict no tokens, such as classifiers of texts, are not checked.
    """
    if _predicts_tokens(info):
        first = data.batches[0][:1]
        one = replace(data, batches=[first], labels=[data.labels[0][: first.numel()]])
        check_language_loss(mean_loss(model, one), info, tokenizer)


def _predicts_tokens(info: DataInfo) -> bool:
    task = task_of(info)
    return task.reads_tokens and not task.exact_outputs


def check_language_loss(loss: float, info: DataInfo, tokenizer: str) -> None:
    """Raise CalibrationError if a language model's loss, in nats per token, is well above that of a uniform guess.

    The tokenizer is then wrong, or the model untrained, and pruning is meaningless.
    """
    uniform = math.log(info.num_classes)
    if _predicts_tokens(info) and not loss <= uniform + _MOST_EXCESS:
        raise CalibrationError(
            f"the model's loss on this text is {loss:.2f} nats per token before pruning, above the {uniform:.2f} of a "
            f"uniform guess among {info.num_classes} tokens: dataset.tokenizer={tokenizer} is not the one that it was "
            "trained with, or its weights are not trained"
        )
