"""FjORD's ordered dropout: each local step trains a random nested width of the client's slice.

A step copies the first units of every axis into a small dense model, computes gradients there, and adds them into the
client's model, whose optimiser then steps. Units outside get zero gradient, as if dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedlp.models.spec import named_tensors
from fedlp.pruning.tracing.widths import Dim, WidthSpec, cut_model
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
        self._pairs = [(tensor, large[name], spec.dims[name]) for name, tensor in named_tensors(self._small).items()]

    @torch.no_grad()
    def pull(self) -> nn.Module:
        """Copy the client's current values into the nested model and return it."""
        for tensor, large, dims in self._pairs:
            _stacked(tensor, dims).copy_(_corner(large, tensor, dims))
            tensor.grad = None
        return self._small

    @torch.no_grad()
    def push(self) -> None:
        """Set the client's gradients to the nested model's, zero elsewhere, and take over its buffers."""
        for tensor, large, dims in self._pairs:
            if tensor.requires_grad:
                large.grad = torch.zeros_like(large)
                if tensor.grad is not None:
                    _corner(large.grad, tensor, dims).copy_(_stacked(tensor.grad, dims))
            else:
                _corner(large, tensor, dims).copy_(_stacked(tensor, dims))


def _stacked(tensor: Tensor, dims: Sequence[Dim]) -> Tensor:
    """Return a view in which the stacked copies of an axis have a dimension of their own."""
    view = tensor.detach()
    for position in reversed(range(len(dims))):
        if dims[position].copies > 1:
            view = view.view(*view.shape[:position], dims[position].copies, -1, *view.shape[position + 1 :])
    return view


def _corner(large: Tensor, small: Tensor, dims: Sequence[Dim]) -> Tensor:
    """Return a view of the first units of ``large``, stacked: the leading corner as large as ``small``."""
    return _stacked(large, dims)[tuple(slice(size) for size in _stacked(small, dims).shape)]


def nested_counts(counts: Mapping[str, int], sizes: Mapping[str, int], level: float) -> dict[str, int]:
    """Return the units of each axis at a width relative to the global model, never more than the client has."""
    return {axis: min(count, max(1, math.ceil(level * sizes[axis] - 1e-9))) for axis, count in counts.items()}
