"""FjORD's ordered dropout: each local step trains a random nested width of the client's slice.

A step copies the first units of every axis into a small dense model, computes gradients there, and adds them into the
client's model, whose optimizer then steps. Units outside get zero gradient, as if dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedlp.models.spec import named_tensors
from fedlp.pruning.tracing.widths import Dim, WidthSpec, cut_model
from fedlp.types import Keep


class NestedWidth:
    """Nested width of a client's model: a small dense model, with copies to and from it.

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
            for inner, outer in _corners(tensor, large, dims):
                inner.copy_(outer)
            tensor.grad = None
        return self._small

    @torch.no_grad()
    def push(self) -> None:
        """Set the client's gradients to the nested model's, zero elsewhere, and take over its buffers."""
        for tensor, large, dims in self._pairs:
            source, target = tensor, large
            if tensor.requires_grad:
                target = large.grad = torch.zeros_like(large)
                if tensor.grad is None:
                    continue
                source = tensor.grad
            for inner, outer in _corners(source, target, dims):
                outer.copy_(inner)


def _corners(small: Tensor, large: Tensor, dims: Sequence[Dim]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of a small tensor and of the first units of a large one, as large as the former."""
    for inner, outer, parts in _segments(small.detach(), large.detach(), dims):
        stacked = _stacked(inner, parts)
        yield stacked, _stacked(outer, parts)[tuple(slice(size) for size in stacked.shape)]


def _segments(small: Tensor, large: Tensor, dims: Sequence[Dim]) -> Iterator[tuple[Tensor, Tensor, tuple[Dim, ...]]]:
    """Yield parts of two tensors in which all copies of an axis have the same number of entries."""
    position = next((position for position, dim in enumerate(dims) if dim.behind), None)
    if position is None:
        yield small, large, tuple(dims)
        return
    dim = dims[position]
    segments = [dim._replace(behind=()), *(Dim(dim.axis, entries) for entries in dim.behind)]
    sizes = [segment.entries * segment.copies for segment in segments]
    inner, outer = (
        torch.split(tensor, [size * tensor.shape[position] // sum(sizes) for size in sizes], position)
        for tensor in (small, large)
    )
    for segment, *parts in zip(segments, inner, outer, strict=True):
        yield parts[0], parts[1], (*dims[:position], segment, *dims[position + 1 :])


def _stacked(tensor: Tensor, dims: Sequence[Dim]) -> Tensor:
    """Return a view in which the stacked copies of an axis have a dimension of their own."""
    view = tensor
    for position in reversed(range(len(dims))):
        if dims[position].copies > 1:
            view = view.view(*view.shape[:position], dims[position].copies, -1, *view.shape[position + 1 :])
    return view


def nested_counts(counts: Mapping[str, int], sizes: Mapping[str, int], level: float) -> dict[str, int]:
    """Return the units of each axis at a width relative to the global model, at most the client's."""
    return {axis: min(count, max(1, math.ceil(level * sizes[axis] - 1e-9))) for axis, count in counts.items()}
