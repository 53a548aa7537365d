"""ResNets for 32 x 32 images (He et al., CVPR 2016, section 4.2): three stages of 16, 32 and 64 channels.

Shortcuts between stages are of option A, without parameters: every second pixel, and zeros for the new channels.
Trained weights are read from a safetensors file with the names that the usual PyTorch implementations give them,
whether or not these start with ``module.``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.errors import ConfigError
from fedlp.models.blueprint import Blueprint
from fedlp.models.cnn import require_images
from fedlp.models.forward import first_line
from fedlp.models.stored_dtype import stored_dtype
from fedlp.registry import register

DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}  # blocks per stage
_CHANNELS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        before = (outputs - inputs) // 2
        self.padding = (0, 0, 0, 0, before, outputs - inputs - before)  # zeros around the channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, H, W) to (batch, outputs, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """A stem, three stages of ``blocks`` blocks, a global average pool and a linear layer."""

    def __init__(self, channels: int, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, _CHANNELS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_CHANNELS[0])
        inputs = _CHANNELS[0]
        for stage, outputs in enumerate(_CHANNELS, 1):
            first = BasicBlock(inputs, outputs, stride=1 if stage == 1 else 2)
            rest = [BasicBlock(outputs, outputs, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
            inputs = outputs
        self.linear = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, C, H, W) to logits (batch, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(stage)(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CifarResNetBlueprint(Blueprint):
    """Blueprint of one :class:`CifarResNet`; ``path`` names trained weights."""

    name: str
    path: str | None
    input_shape: tuple[int, ...]
    num_classes: int

    def __post_init__(self) -> None:
        if self.name not in DEPTHS:
            raise ConfigError(f"model.name={self.name} is none of {', '.join(DEPTHS)}")

    def check_inputs(self) -> None:
        """Raise ConfigError for images that are too small, or other data."""
        require_images(self.name, self.input_shape, 4)

    def build(self) -> nn.Module:
        """Return the network with fresh parameters."""
        return CifarResNet(self.input_shape[0], DEPTHS[self.name], self.num_classes)

    def build_initial(self) -> nn.Module:
        """Return the initial network."""
        model = self.build()
        if self.path is not None:
            model.load_state_dict(_read_weights(self.path, model))
        return model

    def stored_dtype(self) -> torch.dtype:
        """Return the floating-point format of the weight file."""
        return (self.path and stored_dtype(Path(self.path).expanduser())) or torch.float32


def _read_weights(path: str, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a file under the model's names; ConfigError if they do not fit the model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(Path(path).expanduser())
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"model.path={path} cannot be read: {first_line(error)}; give a safetensors file of trained weights"
        ) from error
    found = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            found.setdefault(name, tensor)
        elif name not in found or found[name].shape != tensor.shape:
            raise ConfigError(f"model.path={path} does not fit the model: {name} is missing or of another shape")
    return {name: found[name] for name in model.state_dict()}


@register("model", "cifar_resnet")
def cifar_resnet(name: str, input_shape: tuple[int, ...], num_classes: int, path: str | None = None) -> Blueprint:
    """ResNet-20 to 110 for 32 x 32 images by ``model.name``; ``path`` is a safetensors file of weights."""
    return CifarResNetBlueprint(name, path, input_shape, num_classes)
