"""Causal language modelling: prediction of each token from its predecessors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedlp.data.examples import IGNORE_INDEX, DataInfo, Examples
from fedlp.errors import ConfigError
from fedlp.registry import register
from fedlp.tasks.base import Inputs, Task


@register("task", "causal_lm")
@dataclass(frozen=True)
class CausalLM(Task):
    """Cross-entropy of the next token; perplexity. Padding is neither trained on nor counted.

    Attributes
    ----------
    label_smoothing : float
        Probability mass moved from the target token to all tokens evenly, in [0, 1).
    """

    label_smoothing: float = 0.0
    metrics: tuple[str, ...] = ("perplexity",)

    targets: ClassVar[str] = "tokens to predict"
    reads_tokens: ClassVar[bool] = True
    is_softmax: ClassVar[bool] = True
    exact_outputs: ClassVar[bool] = False
    auto_model: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str] = "CAUSAL_LM"
    least_loss: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing={self.label_smoothing} is not allowed: it must be in [0, 1)")

    def prepare(self, inputs: Tensor, info: DataInfo, device: torch.device) -> Inputs:
        """Return all tokens but the last of each window, (n, L); padding becomes token 0, whose loss is ignored."""
        return inputs.to(device)[:, :-1].clamp(min=0)

    def loss(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy per predicted token."""
        flat, labels = outputs.reshape(-1, outputs.shape[-1]), self.labels(inputs, targets).to(outputs.device)
        return F.cross_entropy(flat, labels, ignore_index=IGNORE_INDEX, label_smoothing=self.label_smoothing)

    def loss_sum(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross-entropy of the predicted tokens."""
        flat, labels = outputs.reshape(-1, outputs.shape[-1]), self.labels(inputs, targets).to(outputs.device)
        return F.cross_entropy(flat, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    def count(self, inputs: Tensor, targets: Tensor) -> int:
        """Return the number of predicted tokens."""
        return int((inputs[:, 1:] != IGNORE_INDEX).sum())

    def most_predictions(self, info: DataInfo) -> float:
        """Return the tokens of a window that are predicted."""
        return float(info.input_shape[0])

    def predictions(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and next tokens without padding: (predicted, vocabulary) and (predicted,)."""
        flat, labels = outputs.reshape(-1, outputs.shape[-1]), self.labels(inputs, targets).to(outputs.device)
        counted = labels != IGNORE_INDEX
        return (flat, labels) if bool(counted.all()) else (flat[counted], labels[counted])

    def whole(self, examples: Examples) -> Examples:
        """Return the windows without padding."""
        return examples.select((examples.inputs >= 0).all(dim=1).nonzero().flatten().numpy())

    def labels(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the next tokens, (n * L,)."""
        return inputs[:, 1:].reshape(-1)

    def draw_examples(self, info: DataInfo, count: int, rng: np.random.Generator) -> Examples:
        """Return windows of random tokens."""
        tokens = rng.integers(0, info.num_classes, (count, info.input_shape[0] + 1))
        return Examples(torch.from_numpy(tokens), torch.zeros(count, dtype=torch.int64), None)
