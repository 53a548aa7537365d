"""Multi-label classification: any number of labels for each example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedlp.data.examples import DataInfo
from fedlp.errors import ConfigError
from fedlp.registry import register
from fedlp.tasks.base import Task


@register("task", "multi_label")
@dataclass(frozen=True)
class MultiLabel(Task):
    """Binary cross-entropy, averaged over labels; macro-F1 and accuracy by label at a threshold of 1/2.

    Attributes
    ----------
    positive_weights : tuple of float or None
        Weight of each label's positive examples in the training loss; equal if None.
    """

    positive_weights: tuple[float, ...] | None = None
    metrics: tuple[str, ...] = ("macro_f1", "accuracy")

    targets: ClassVar[str] = "indicators of labels"
    least_loss: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if self.positive_weights is not None:
            if not all(0 < weight < float("inf") for weight in self.positive_weights):
                raise ConfigError(f"task.positive_weights={self.positive_weights} must be finite numbers above 0")
            object.__setattr__(self, "positive_weights", tuple(self.positive_weights))

    @property
    def averages_rows(self) -> bool:
        """Always."""
        return True

    def loss(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean binary cross-entropy over examples and labels."""
        weights = self.positive_weights
        given = None if weights is None else torch.tensor(weights).to(outputs)
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs), pos_weight=given)

    def row_losses(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the binary cross-entropy of each example, averaged over its labels."""
        weights = self.positive_weights
        given = None if weights is None else torch.tensor(weights).to(outputs)
        wanted = targets.to(outputs)
        return F.binary_cross_entropy_with_logits(outputs, wanted, pos_weight=given, reduction="none").mean(dim=1)

    def loss_sum(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the binary cross-entropy of each example, averaged over labels and summed over examples."""
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs), reduction="sum") / outputs.shape[-1]

    def check(self, info: DataInfo) -> None:
        """Raise ConfigError if there is not one weight per label."""
        if self.positive_weights is not None and len(self.positive_weights) != info.num_classes:
            raise ConfigError(
                f"task.positive_weights has {len(self.positive_weights)} weights, but {info.name} has "
                f"{info.num_classes} labels; give one for each"
            )

    def draw_targets(self, info: DataInfo, count: int, rng: np.random.Generator) -> Tensor:
        """Return random indicators, (count, labels)."""
        return torch.from_numpy(rng.integers(0, 2, (count, info.num_classes), dtype="uint8"))
