"""Networks of a stranger's: heads that no width rule covers, a size in the code, a forward pass that branches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Body(nn.Module):
    """Two convolutions under a head."""

    def __init__(self, in_channels: int, head: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(in_channels, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.adaptive_avg_pool2d(torch.relu(self.second(torch.relu(self.first(x)))), 2))


class CosineHead(nn.Module):
    """Prototypes: a free parameter."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5.0 * F.linear(F.normalize(x.mean((2, 3))), F.normalize(self.weight))


class ReshapingHead(nn.Module):
    """A size in the code: 12 channels of 2 x 2."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.last = nn.Linear(48, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x.reshape(-1, 48))


def cosine(num_classes: int, in_channels: int) -> nn.Module:
    """Convolutions under prototypes."""
    return Body(in_channels, CosineHead(num_classes))


def reshaping(num_classes: int, in_channels: int) -> nn.Module:
    """Convolutions under a hard-coded reshape."""
    return Body(in_channels, ReshapingHead(num_classes))


class Branching(nn.Module):
    """A forward pass that branches on values, so that nothing of it can be cut."""

    def __init__(self, num_classes: int, in_features: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(in_features, 8), nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1))
        return self.last(x if x.sum() > 0 else -x)
