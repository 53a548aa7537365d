"""Built-in image classifiers: FedLP's CNN and MLPs, and the small CNN of federated benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.errors import ConfigError
from fedlp.models.blueprint import Blueprint
from fedlp.models.dropout import ByteDropout
from fedlp.registry import register

_CONV_CHANNELS = (32, 32, 64, 64, 128, 128)
_CONV_DEPTHS = len(_CONV_CHANNELS) - 1
_MIN_PIXELS = 8  # three pools halve the image
_HEAD_WIDTH = 128

MLP_WIDTHS: dict[str, tuple[int, ...]] = {"plain": (500,), "deep": (512, 128, 128, 64, 32), "linear": ()}


class FedLPCNN(nn.Module):
    """The CNN of FedLP's experiments on CIFAR-10 [1]_, whole or as a prefix with a personal head.

    Six 3x3 convolutions (32, 32, 64, 64, 128, 128 channels), each followed by ReLU and then BatchNorm, a pool after
    every second one, and two linear layers without an activation between them: 551,466 parameters for 3 x 32 x 32
    inputs and 10 classes. Depth d < 5 has the first d + 1 convolutions, a pool, and a head of two such linear layers.

    References
    ----------
    .. [1] Zhu, Shi, Luo, Wang, Peng, Fan, Letaief: FedLP: Layer-wise Pruning Mechanism for Communication-Computation
       Efficient Federated Learning. ICC 2023. arXiv:2303.06360.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, depth: int = _CONV_DEPTHS) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.num_convs = depth + 1
        for index, out_channels in enumerate(_CONV_CHANNELS[: self.num_convs], start=1):
            self.add_module(f"conv{index}", nn.Conv2d(channels, out_channels, 3, padding=1))
            self.add_module(f"bn{index}", nn.BatchNorm2d(out_channels))
            channels = out_channels
        num_pools = (self.num_convs + 1) // 2
        features = channels * (height >> num_pools) * (width >> num_pools)
        if depth == _CONV_DEPTHS:
            self.fc1 = nn.Linear(features, _HEAD_WIDTH)
            self.fc2 = nn.Linear(_HEAD_WIDTH, num_classes)
        else:
            self.personal_head = nn.Sequential(nn.Linear(features, _HEAD_WIDTH), nn.Linear(_HEAD_WIDTH, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, C, H, W) to logits (batch, classes)."""
        for index in range(1, self.num_convs + 1):
            x = F.relu(self.get_submodule(f"conv{index}")(x), inplace=True)
            x = self.get_submodule(f"bn{index}")(x)
            if index % 2 == 0 or index == self.num_convs:
                x = F.max_pool2d(x, 2)
        x = torch.flatten(x, 1)
        if self.num_convs <= _CONV_DEPTHS:
            return self.personal_head(x)  # type: ignore[no-any-return]
        return self.fc2(self.fc1(x))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """ReLU layers ``fc1``, ``fc2``, ... of the given widths, and a linear output: the next ``fc`` or a personal head.

    Deviations: FedLP's official deepest client leaves out a ReLU that the global model has; here both compute the same.
    """

    def __init__(self, num_features: int, widths: tuple[int, ...], num_classes: int, personal: bool) -> None:
        super().__init__()
        self.num_hidden = len(widths)
        for index, width in enumerate(widths, start=1):
            self.add_module(f"fc{index}", nn.Linear(num_features, width))
            num_features = width
        self.output = "personal_head" if personal else f"fc{self.num_hidden + 1}"
        self.add_module(self.output, nn.Linear(num_features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, ...) to logits (batch, classes)."""
        x = torch.flatten(x, 1)
        for index in range(1, self.num_hidden + 1):
            x = F.relu(self.get_submodule(f"fc{index}")(x), inplace=True)
        return self.get_submodule(self.output)(x)  # type: ignore[no-any-return]


class SmallCNN(nn.Module):
    """The CNN that federated benchmarks train on CIFAR-10: two 3x3 convolutions, a pool and two linear layers.

    1,626,442 parameters for 3 x 32 x 32 inputs and 10 classes. The second ReLU comes after the pool instead of before
    it: the maximum of rectified values is the rectified maximum, on a quarter of the entries.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.conv1 = nn.Conv2d(channels, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dropout1 = ByteDropout(0.25)
        self.fc1 = nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128)
        self.dropout2 = ByteDropout(0.5)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, C, H, W) to logits (batch, classes)."""
        x = F.relu(self.conv1(x), inplace=True)
        x = F.relu(F.max_pool2d(self.conv2(x), 2), inplace=True)
        x = torch.flatten(self.dropout1(x), 1)
        x = F.relu(self.fc1(x), inplace=True)
        return self.fc2(self.dropout2(x))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class FedLPCNNBlueprint(Blueprint):
    """Blueprint of :class:`FedLPCNN`."""

    input_shape: tuple[int, ...]
    num_classes: int
    name: str = "fedlp_cnn"
    num_depths: int = _CONV_DEPTHS

    def check_inputs(self) -> None:
        """Raise ConfigError for images that are too small, or other data."""
        require_images(self.name, self.input_shape, _MIN_PIXELS)

    def build(self) -> nn.Module:
        """Return the whole network."""
        return FedLPCNN(self.input_shape, self.num_classes)

    def build_prefix(self, depth: int) -> nn.Module:
        """Return the first ``depth + 1`` convolutions with a personal head."""
        return FedLPCNN(self.input_shape, self.num_classes, depth)


@dataclass(frozen=True)
class MLPBlueprint(Blueprint):
    """Blueprint of :class:`MLP`; n hidden layers give n depths; none give softmax regression."""

    num_features: int
    widths: tuple[int, ...]
    num_classes: int
    name: str = "fedlp_mlp"

    @property
    def num_depths(self) -> int:  # type: ignore[override]
        """Depth k < n has the first k hidden layers; depth n is the whole network."""
        return max(1, len(self.widths))

    def build(self) -> nn.Module:
        """Return the whole network."""
        return self._network(self.widths, personal=False)

    def build_prefix(self, depth: int) -> nn.Module:
        """Return the first ``depth`` hidden layers with a personal output layer."""
        return self._network(self.widths[:depth], personal=True)

    def _network(self, widths: tuple[int, ...], personal: bool) -> nn.Module:
        return MLP(self.num_features, widths, self.num_classes, personal)


@dataclass(frozen=True)
class SmallCNNBlueprint(Blueprint):
    """Blueprint of :class:`SmallCNN`."""

    input_shape: tuple[int, ...]
    num_classes: int
    name: str = "small_cnn"

    def check_inputs(self) -> None:
        """Raise ConfigError for images that are too small, or other data."""
        require_images(self.name, self.input_shape, 6)

    def build(self) -> nn.Module:
        """Return the whole network."""
        return SmallCNN(self.input_shape, self.num_classes)


def require_images(name: str, input_shape: tuple[int, ...], min_pixels: int) -> None:
    """Raise ConfigError unless examples are (C, H, W) images of at least ``min_pixels`` in height and width."""
    if len(input_shape) != 3:
        raise ConfigError(f"model {name} takes (channels, height, width) images, but the data set has {input_shape}")
    if min(input_shape[1:]) < min_pixels:
        raise ConfigError(f"model {name} needs images of at least {min_pixels} pixels, not {input_shape[1:]}")


@register("model", "fedlp_cnn")
def fedlp_cnn(input_shape: tuple[int, ...], num_classes: int) -> Blueprint:
    """FedLP's CNN for small images: six convolutions, five depths."""
    return FedLPCNNBlueprint(input_shape, num_classes)


@register("model", "small_cnn")
def small_cnn(input_shape: tuple[int, ...], num_classes: int) -> Blueprint:
    """The CNN of federated benchmarks: two convolutions."""
    return SmallCNNBlueprint(input_shape, num_classes)


@register("model", "fedlp_mlp")
def fedlp_mlp(input_shape: tuple[int, ...], num_classes: int, variant: str = "plain") -> Blueprint:
    """FedLP's MLPs: ``variant`` is plain (one hidden layer of 500), deep (five, each one a depth) or linear."""
    if variant not in MLP_WIDTHS:
        raise ConfigError(f"model.variant={variant} is none of {', '.join(MLP_WIDTHS)}")
    return MLPBlueprint(math.prod(input_shape), MLP_WIDTHS[variant], num_classes)
