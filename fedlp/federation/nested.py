"""FjORD's ordered dropout: each local step trains a random nested width of the client's slice.

A step copies the first units of every axis into a small dense model, computes gradients there, and adds them into the
client's model, whose optimiser then steps. Units outside get zero gradient, as if dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedlp.models.spec import named_tensors
from fedlp.pruning.groups import WidthSpec, cut_model
from fedlp.types import Keep


class NestedWidth:
    """One nested width of a client's model: a small dense model and the way to and from it.

    Parameters
    ----------
    model : nn.Module
        The client's model, whose axes have ``counts`` units.
    counts, kept : mapping from axis name to int
        Units in the client's model, and in the nested one.
    """

    def __init__(self, model: nn.Module, spec: WidthSpec, counts: Mapping[str, int], kept: Mapping[str, int]) -> None:
        widths = {axis: Keep.first(kept[axis], size) for axis, size in counts.items()}
        self._small = cut_model(model, replace(spec, axes=dict(counts)), widths)
        large = named_tensors(model)
        # First units are leading corners, so a view of the client's tensor is all it takes.
        self._pairs = [
            (_corner(large[name], tensor), tensor, large[name]) for name, tensor in named_tensors(self._small).items()
        ]

    @torch.no_grad()
    def pull(self) -> nn.Module:
        """Copy the client's current values into the nested model and return it."""
        for corner, tensor, _ in self._pairs:
            tensor.copy_(corner)
            tensor.grad = None
        return self._small

    @torch.no_grad()
    def push(self) -> None:
        """Set the client's gradients to the nested model's, zero elsewhere, and take over its buffers."""
        for corner, tensor, large in self._pairs:
            if tensor.requires_grad:
                large.grad = torch.zeros_like(large)
                if tensor.grad is not None:
                    _corner(large.grad, tensor).copy_(tensor.grad)
            else:
                corner.copy_(tensor)


def _corner(large: Tensor, small: Tensor) -> Tensor:
    """Return a view of the leading corner of ``large`` that has the shape of ``small``."""
    return large.detach()[tuple(slice(size) for size in small.shape)]


def nested_counts(counts: Mapping[str, int], sizes: Mapping[str, int], level: float) -> dict[str, int]:
    """Return the units of each axis at a width relative to the global model, never more than the client has."""
    return {axis: min(count, max(1, math.ceil(level * sizes[axis] - 1e-9))) for axis, count in counts.items()}
