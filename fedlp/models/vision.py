"""torchvision's classifiers by name, adapted to the data: channels, classes and, below 64 pixels, resolution.

* ResNets (ResNeXt, Wide ResNet) get a 3x3 stem of stride 1 and no pool after it.
* VGGs lose the pools that would leave nothing, and end in a global average pool and one linear layer.
* MobileNetV2 loses strides, the first ones first, until the last map is at least 4x4 (or the image's own size).
* Every other classifier keeps its form; images that it cannot take are refused.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlp.errors import ConfigError
from fedlp.models.blueprint import Blueprint
from fedlp.models.cnn import require_images
from fedlp.models.torchvision_compat import import_torchvision
from fedlp.registry import register

_SMALL_IMAGE = 64
_MIN_LAST_MAP = 4
_MAX_GROUPS = 32
_MIN_GROUP_SIZE = 4
_NUM_DEPTHS = {"resnet": 4, "resnext": 4, "wide_resnet": 4, "vgg": 5, "mobilenet_v2": 5}


class PrefixNet(nn.Module):
    """The first modules of a network, under their own names, then a global average pool and a personal linear layer."""

    def __init__(self, prefix: Mapping[str, nn.Module], num_classes: int) -> None:
        super().__init__()
        for name, module in prefix.items():
            self.add_module(name, module)
        self.prefix = tuple(prefix)
        channels = [module.out_channels for module in self.modules() if isinstance(module, nn.Conv2d)][-1]
        self.personal_head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, C, H, W) to logits (batch, classes)."""
        for name in self.prefix:
            x = self.get_submodule(name)(x)
        return self.personal_head(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TorchvisionBlueprint(Blueprint):
    """Blueprint of one torchvision classifier.

    Attributes
    ----------
    name : str
        As in ``torchvision.models.list_models``.
    norm : "batch" or "group"
        "group" puts a GroupNorm (at most 32 groups of at least 4 channels) in place of every BatchNorm2d.
    pretrained : bool
        Start from torchvision's default weights wherever shapes agree.
    """

    name: str
    norm: str
    pretrained: bool
    input_shape: tuple[int, ...]
    num_classes: int

    def __post_init__(self) -> None:
        models = import_torchvision().models
        known = models.list_models(module=models)
        if self.name not in known:
            close = difflib.get_close_matches(self.name, known, n=5, cutoff=0.4)
            raise ConfigError(f"torchvision has no classifier {self.name!r}; close names: {', '.join(close) or 'none'}")

    def check_inputs(self) -> None:
        """Raise ConfigError for images that are too small, or other data."""
        require_images(self.name, self.input_shape, 1)

    @property
    def num_depths(self) -> int:  # type: ignore[override]
        """ResNets: stem and stages; VGGs: pools; MobileNetV2: strides; 1 for every other classifier."""
        return next((depths for family, depths in _NUM_DEPTHS.items() if self.name.startswith(family)), 1)

    def build(self) -> nn.Module:
        """Return the adapted classifier with fresh parameters."""
        models = import_torchvision().models
        arguments = _family_arguments(self.name, self.input_shape)
        is_small = min(self.input_shape[1:]) < _SMALL_IMAGE
        is_light_vgg = is_small and self.name.startswith("vgg")
        device = torch.get_default_device()
        with torch.device("meta" if is_light_vgg else device):  # the head of a VGG that goes has 100 M parameters
            model: nn.Module = models.get_model(self.name, weights=None, num_classes=self.num_classes, **arguments)
            _adapt_channels(model, self.input_shape[0])
            if is_small:
                _adapt_resolution(model, min(self.input_shape[1:]), self.num_classes)
        if is_light_vgg:
            _initialise_vgg(model.to_empty(device=device))
        if self.norm == "group":
            _replace_batch_norms(model)
        return model

    def build_initial(self) -> nn.Module:
        """Return the initial classifier."""
        model = self.build()
        if self.pretrained:
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            weights = _download_weights(self.name)
            fitting = {name: tensor for name, tensor in weights.items() if shapes.get(name) == tensor.shape}
            model.load_state_dict(fitting, strict=False)
        return model

    def build_prefix(self, depth: int) -> nn.Module:
        """Return the first stages with a global average pool and a personal linear layer."""
        return PrefixNet(_prefixes(self.build())[depth - 1], self.num_classes)


def _family_arguments(name: str, input_shape: tuple[int, ...]) -> dict[str, Any]:
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        return {"image_size": input_shape[1]}
    return {}


def _adapt_channels(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one for this number of input channels."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels != channels:
                model.set_submodule(name, _conv_like(module, in_channels=channels))
            return


def _conv_like(conv: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    """Return a fresh ungrouped convolution that differs from ``conv`` in some arguments."""
    arguments: dict[str, Any] = {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "bias": conv.bias is not None,
    }
    fresh = nn.Conv2d(**(arguments | changes))
    nn.init.kaiming_normal_(fresh.weight, mode="fan_out", nonlinearity="relu")
    if fresh.bias is not None:
        nn.init.zeros_(fresh.bias)
    return fresh


def _adapt_resolution(model: nn.Module, pixels: int, num_classes: int) -> None:
    models = import_torchvision().models
    if isinstance(model, models.ResNet):
        model.conv1 = _conv_like(model.conv1, kernel_size=3, stride=1, padding=1)
        model.maxpool = nn.Identity()
    elif isinstance(model, models.VGG):
        pools = [index for index, module in enumerate(model.features) if isinstance(module, nn.MaxPool2d)]
        for index in pools[int(math.log2(pixels)) :]:
            model.features[index] = nn.Identity()
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, num_classes)
    elif isinstance(model, models.MobileNetV2):
        strided = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.stride == (2, 2)]
        num_kept = sum(math.ceil(pixels / 2**halvings) >= _MIN_LAST_MAP for halvings in range(1, len(strided) + 1))
        for conv in strided[: len(strided) - num_kept]:
            conv.stride = (1, 1)


def _initialise_vgg(model: nn.Module) -> None:
    """Draw parameters as torchvision does for VGGs."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.Linear):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _replace_batch_norms(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            channels = module.num_features
            fitting = [n for n in range(1, _MAX_GROUPS + 1) if channels % n == 0 and channels // n >= _MIN_GROUP_SIZE]
            model.set_submodule(name, nn.GroupNorm(max(fitting, default=1), channels))


def _prefixes(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Return the modules of every depth below the full one."""
    models = import_torchvision().models
    if isinstance(model, models.ResNet):
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        return [{name: model.get_submodule(name) for name in names[:end]} for end in (5, 6, 7)]
    features = model.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    if isinstance(model, models.VGG):
        ends = [index + 1 for index, module in enumerate(features) if isinstance(module, nn.MaxPool2d | nn.Identity)]
        return [{"features": features[:end]} for end in ends[:-1]]
    ends = [index for index, module in enumerate(features) if getattr(module, "stride", 1) == 2]
    return [{"features": features[:end]} for end in ends]


def _download_weights(name: str) -> Mapping[str, Tensor]:
    weights = import_torchvision().models.get_model_weights(name).DEFAULT
    try:
        state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"torchvision's weights of {name} cannot be loaded ({error}); set model.pretrained=false, or put "
            f"{weights.url.rpartition('/')[2]} into torch's hub/checkpoints folder"
        ) from error
    return state


@register("model", "torchvision")
def torchvision_classifier(
    name: str, input_shape: tuple[int, ...], num_classes: int, norm: str = "batch", pretrained: bool = False
) -> Blueprint:
    """Any torchvision classifier by ``model.name``; ``norm`` batch or group; ``pretrained`` weights."""
    if norm not in ("batch", "group"):
        raise ConfigError(f"model.norm={norm} is neither batch nor group")
    return TorchvisionBlueprint(name, norm, pretrained, input_shape, num_classes)
