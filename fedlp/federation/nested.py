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

from fedlp.models import state_tensors
from fedlp.pruning.groups import WidthSpec, cut_model, slice_tensor, tensor_keeps
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
        client_spec = replace(spec, axes=dict(counts))
        widths = {axis: Keep.first(kept[axis], size) for axis, size in counts.items()}
        self.small = cut_model(model, client_spec, widths)
        self._large = state_tensors(model)
        self._tensors = state_tensors(self.small)
        self._keeps = {
            name: tensor_keeps(client_spec, name, tuple(tensor.shape), widths) for name, tensor in self._large.items()
        }

    @torch.no_grad()
    def pull(self) -> nn.Module:
        """Copy the client's current values into the nested model and return it."""
        for name, tensor in self._tensors.items():
            tensor.copy_(slice_tensor(self._large[name], self._keeps[name]))
            tensor.grad = None
        return self.small

    @torch.no_grad()
    def push(self) -> None:
        """Set the client's gradients to the nested model's, zero elsewhere, and take over its buffers."""
        for name, tensor in self._tensors.items():
            large = self._large[name]
            if tensor.requires_grad:
                large.grad = torch.zeros_like(large)
                if tensor.grad is not None:
                    _first(large.grad, tensor).copy_(tensor.grad)
            else:
                _first(large, tensor).copy_(tensor)


def _first(large: Tensor, small: Tensor) -> Tensor:
    """Return the leading corner of ``large`` that has the shape of ``small``."""
    return large[tuple(slice(size) for size in small.shape)]


def nested_counts(counts: Mapping[str, int], sizes: Mapping[str, int], level: float) -> dict[str, int]:
    """Return the units of each axis at a width relative to the global model, never more than the client has."""
    return {axis: min(count, max(1, math.ceil(level * sizes[axis] - 1e-9))) for axis, count in counts.items()}
