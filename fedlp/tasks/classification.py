"""Classification of images and arrays: one class for each example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlp.data.examples import DataInfo, Examples
from fedlp.errors import ConfigError
from fedlp.registry import register
from fedlp.tasks.base import LossFn, Task


@register("task", "classification")
@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy over classes; accuracy.

    Attributes
    ----------
    label_smoothing : float
        Probability mass moved from the target class to all classes evenly, in [0, 1).
    class_weights : None, "balanced" or tuple of float
        Weight of each class in the training loss: equal, inverse to the client's own counts, or given.
    """

    label_smoothing: float = 0.0
    class_weights: Any = None
    metrics: tuple[str, ...] = ("accuracy",)

    targets: ClassVar[str] = "a class for each example"
    has_classes: ClassVar[bool] = True
    is_softmax: ClassVar[bool] = True
    least_loss: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing={self.label_smoothing} is not allowed: it must be in [0, 1)")
        weights = self.class_weights
        if weights is None or weights == "balanced":
            return
        if isinstance(weights, str) or not all(isinstance(w, int | float) and 0 <= w < float("inf") for w in weights):
            raise ConfigError(f"task.class_weights={weights} must be null, balanced or one finite weight per class")
        object.__setattr__(self, "class_weights", tuple(weights))

    @property
    def averages_rows(self) -> bool:
        """Whether classes have equal weights."""
        return self.class_weights is None

    def loss(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy with label smoothing and class weights."""
        weights = self.class_weights
        given = None if weights is None or isinstance(weights, str) else torch.tensor(weights).to(outputs)
        return self._cross_entropy(outputs, targets, given)

    def row_losses(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each example, smoothed as the options say."""
        labels = targets.to(outputs.device)
        return F.cross_entropy(outputs, labels, reduction="none", label_smoothing=self.label_smoothing)

    def criterion(self, examples: Examples) -> LossFn:
        """Return the loss with weights inverse to the counts of the client's classes where they are ``balanced``."""
        if self.class_weights != "balanced" or not len(examples):
            return self.loss
        counts = torch.bincount(examples.targets)
        shares = torch.where(counts > 0, len(examples) / ((counts > 0).sum() * counts.clamp(min=1)), 0.0)

        def balanced(outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
            weights = torch.zeros(outputs.shape[-1])
            weights[: len(shares)] = shares
            return self._cross_entropy(outputs, targets, weights.to(outputs))

        return balanced

    def loss_sum(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross-entropy."""
        return F.cross_entropy(outputs, targets.to(outputs.device), reduction="sum")

    def check(self, info: DataInfo) -> None:
        """Raise ConfigError if there is not one weight per class."""
        if isinstance(self.class_weights, tuple) and len(self.class_weights) != info.num_classes:
            raise ConfigError(
                f"task.class_weights has {len(self.class_weights)} weights, but {info.name} has {info.num_classes} "
                "classes; give one for each"
            )

    def _cross_entropy(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        labels = targets.to(outputs.device)
        return F.cross_entropy(outputs, labels, weights, label_smoothing=self.label_smoothing)
