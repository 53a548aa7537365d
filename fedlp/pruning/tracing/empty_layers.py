"""Layers of a classifier whose residual branch has lost all its units.

What computes the units gives tensors without channels, and what read them a constant, so that no layer of the branch
computes anything and sizes are as before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm


class EmptyLayer(nn.Module):
    """Convolution or linear layer without inputs or without outputs: its bias, or zeros, at every position.

    Attributes
    ----------
    weight : (outputs, inputs, ...)
        Without entries; not a parameter.
    """

    def __init__(self, layer: _Conv | nn.Linear) -> None:
        super().__init__()
        self.shape = tuple(layer.weight.shape)
        self.bias = layer.bias if len(layer.weight) else None
        self.windows: list[tuple[int, int, int]] = []  # of each spatial dimension: padding, extent, stride
        if isinstance(layer, _Conv):
            padding = layer.padding if not isinstance(layer.padding, str) else (0,) * len(layer.stride)
            extents = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            if layer.padding == "same":
                extents = [0] * len(extents)
            self.windows = list(zip(padding, extents, layer.stride, strict=True))

    @property
    def weight(self) -> Tensor:
        """Empty weight, for its shape."""
        return torch.empty(self.shape)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, any, ...) to (batch, outputs, ...), or (..., any) to (..., outputs)."""
        outputs = self.shape[0]
        values = inputs.new_zeros(outputs) if self.bias is None else self.bias
        if not self.windows:
            return values.expand(*inputs.shape[:-1], outputs).clone()  # which may be written to
        sizes = zip(inputs.shape[2:], self.windows, strict=True)
        spatial = [(size + 2 * padding - extent - 1) // stride + 1 for size, (padding, extent, stride) in sizes]
        return values.view(-1, *[1] * len(spatial)).expand(len(inputs), outputs, *spatial).contiguous()


def drop_empty_layers(model: nn.Module) -> None:
    """Replace the layers and norms without units of a cut classifier, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, _Conv | nn.Linear) and not module.weight.numel():
            model.set_submodule(path, EmptyLayer(module))
        elif isinstance(module, _Norm) and _width(module) == 0:
            model.set_submodule(path, nn.Identity())


def _width(norm: _Norm) -> int:
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
