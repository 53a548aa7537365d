"""What pruning may look at, and how it looks: a few prepared examples, and the method of a config."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlp.config import PrunerConfig
from fedlp.data.datasets import DataInfo, Examples
from fedlp.pruning.pruner import Calibration
from fedlp.pruning.reader_layers import Method
from fedlp.pruning.scores.criterion import as_score
from fedlp.training.local_training import prepare_inputs


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
    """Return the examples without padding: all images, of text only whole windows."""
    if info.task != "language":
        return examples
    return examples.select((examples.inputs >= 0).all(dim=1).nonzero().flatten().numpy())


def batch_calibration(
    chosen: Examples, info: DataInfo, batch_size: int, seed: int, device: torch.device
) -> Calibration:
    """Return examples, which have no padding, prepared and in batches; ``seed`` is that of what pruning draws."""
    batches: list[Tensor] = []
    labels: list[Tensor] = []
    for start in range(0, len(chosen), batch_size):
        raw = chosen.inputs[start : start + batch_size]
        batches.append(prepare_inputs(raw, info, device))
        is_text = info.task == "language"
        labels.append((raw[:, 1:].flatten() if is_text else chosen.targets[start : start + batch_size]).to(device))
    return Calibration(batches, labels, seed)
