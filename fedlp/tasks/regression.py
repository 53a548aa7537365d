"""Regression: one or several values for each example."""

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


@register("task", "regression")
@dataclass(frozen=True)
class Regression(Task):
    """Squared error, averaged over values; mean absolute error, root mean square error and R².

    Attributes
    ----------
    huber : float or None
        Absolute error beyond which the training loss is linear (Huber's loss), > 0; None for the squared error.
    """

    huber: float | None = None
    metrics: tuple[str, ...] = ("rmse", "mae", "r2")

    targets: ClassVar[str] = "values"
    least_loss: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if self.huber is not None and not 0 < self.huber < float("inf"):
            raise ConfigError(f"task.huber={self.huber} is not allowed: it must be null or a finite number above 0")

    @property
    def averages_rows(self) -> bool:
        """Always."""
        return True

    def loss(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error, or Huber's loss."""
        wanted = _like(targets, outputs)
        return F.mse_loss(outputs, wanted) if self.huber is None else F.huber_loss(outputs, wanted, delta=self.huber)

    def row_losses(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the squared error of each example, or Huber's loss, averaged over its values."""
        wanted = _like(targets, outputs)
        if self.huber is None:
            return F.mse_loss(outputs, wanted, reduction="none").flatten(1).mean(dim=1)
        return F.huber_loss(outputs, wanted, reduction="none", delta=self.huber).flatten(1).mean(dim=1)

    def loss_sum(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the squared error of each example, averaged over its values and summed over examples."""
        return F.mse_loss(outputs, _like(targets, outputs), reduction="sum") / outputs[0].numel()

    def predictions(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and targets of one shape, (n, values)."""
        return outputs, _like(targets, outputs)

    def draw_targets(self, info: DataInfo, count: int, rng: np.random.Generator) -> Tensor:
        """Return standard normal values, (count, values)."""
        return torch.from_numpy(rng.standard_normal((count, info.num_classes), dtype=np.float32))


def _like(targets: Tensor, outputs: Tensor) -> Tensor:
    """Return targets in the shape, type and place of the outputs; (n,) and (n, 1) are the same."""
    return targets.to(outputs).reshape(outputs.shape)
