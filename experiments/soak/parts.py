"""A linear model and data for it: as many examples as clients."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


class Linear(nn.Module):
    """Logistic regression."""

    def __init__(self, num_classes: int = 2, in_features: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.fc(x.flatten(1))


def examples(count: int = 100_000, seed: int = 0):  # type: ignore[no-untyped-def]
    """Two classes on both sides of a plane, with noise; the last 500 are the test set."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count + 500, 8)).astype(np.float32)
    y = (x @ rng.normal(size=8) + 0.5 * rng.normal(size=count + 500) > 0).astype(np.int64)
    return (x[:count], y[:count]), (x[count:], y[count:])
