"""Slicing of tensors along named width axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.errors import ConfigError
from fedlp.types import Keep

_MOST_NAMES, _MOST_REASONS = 3, 4  # of parts that stay whole, in one line
_MAX_PIECES = 8  # runs that are copied as slices; more are gathered by index


class Dim(NamedTuple):
    """Structure of one dimension of a tensor.

    Entry ``e`` of unit ``u`` in copy ``c`` has index ``(c * num_units + u) * entries + e``; after these copies come
    those of ``behind``, in which a unit has another number of entries.

    Attributes
    ----------
    axis : str or None
        Axis of its units; None if it always stays whole.
    entries : int
        Consecutive entries per unit.
    copies : int
        Number of consecutive copies of the axis: 3 in fused queries, keys and values.
    behind : tuple of int
        Entries per unit of each copy after these: keys and values, if several queries share them.
    """

    axis: str | None
    entries: int
    copies: int = 1
    behind: tuple[int, ...] = ()

    def keep(self, units: Keep) -> Keep:
        """Return the kept entries for kept units."""
        found = units.repeat(self.entries).tile(self.copies)
        for entries in self.behind:
            found = found.before(units.repeat(entries))
        return found

    def units(self, count: int) -> NDArray[np.int64]:
        """Return the unit of each entry, of ``count`` units."""
        per_copy = (self.entries,) * self.copies + self.behind
        return np.concatenate([np.repeat(np.arange(count), entries) for entries in per_copy])


WHOLE = Dim(None, 1)


@dataclass(frozen=True)
class WidthSpec:
    """Width axes: dimensions of tensors that lose the same units.

    Attributes
    ----------
    axes : mapping from axis name to int
        Number of units of every axis, in the order of the forward pass. A unit is the smallest removable part: a
        channel, a neuron, a GroupNorm's or a convolution's group, a KV head with its queries, a hidden feature.
    dims : mapping from tensor name to one Dim per dimension
    whole : mapping from part of the model to reason
        Parts that stay whole, since no rule covers them.
    branches : mapping from axis name to tensor names
        Axes that may lose all units, since a residual connection bypasses their *branch*: the layers between it and the
        addition. With the last unit go the tensors along the axis and these, such as those of the branch's norm; the
        bias of its last layer stays.
    """

    axes: Mapping[str, int]
    dims: Mapping[str, tuple[Dim, ...]]
    whole: Mapping[str, str] = field(default_factory=dict)
    branches: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def pinned(self, reasons: Mapping[str, str]) -> WidthSpec:
        """Return the spec in which some axes stay whole, and why."""
        dims = {name: tuple(WHOLE if dim.axis in reasons else dim for dim in each) for name, each in self.dims.items()}
        axes = {axis: size for axis, size in self.axes.items() if axis not in reasons}
        branches = {axis: names for axis, names in self.branches.items() if axis in axes}
        return WidthSpec(axes, dims, {**self.whole, **reasons}, branches)

    @cached_property
    def branch_of(self) -> Mapping[str, str]:
        """Axis of a branch by tensor that goes with its last unit."""
        found = {name: axis for axis, names in self.branches.items() for name in names}
        along = [(name, dim.axis) for name, dims in self.dims.items() for dim in dims if dim.axis in self.branches]
        return {**found, **{name: axis for name, axis in along if axis is not None}}

    def absent(self, widths: Mapping[str, Keep]) -> frozenset[str]:
        """Return the tensors of the branches without units."""
        gone = {axis for axis, keep in widths.items() if not keep.count}
        return frozenset(name for name, axis in self.branch_of.items() if axis in gone) if gone else frozenset()

    def whole_line(self) -> str:
        """Return :meth:`describe_whole` as one line; empty where nothing stays whole."""
        lines = self.describe_whole()
        more = f"; {len(lines) - _MOST_REASONS} more reasons" if len(lines) > _MOST_REASONS else ""
        return "; ".join(lines[:_MOST_REASONS]) + more

    def describe_whole(self) -> list[str]:
        """Return one line per reason for parts of the model that stay whole."""
        by_reason: dict[str, list[str]] = {}
        for part, reason in self.whole.items():
            by_reason.setdefault(reason, []).append(part)
        return [
            f"{_list(parts)} {'stays' if len(parts) == 1 else 'stay'} whole: {why}" for why, parts in by_reason.items()
        ]


def _list(parts: Sequence[str]) -> str:
    """Return up to three names, and how many more there are."""
    shown = ", ".join(parts[:_MOST_NAMES])
    return shown if len(parts) <= _MOST_NAMES else f"{shown} and {len(parts) - _MOST_NAMES} more"


def tensor_keeps(spec: WidthSpec, name: str, shape: Sequence[int], widths: Mapping[str, Keep]) -> tuple[Keep, ...]:
    """Return the kept indices of every dimension of one global tensor.

    Parameters
    ----------
    spec : WidthSpec
        Of the global model.
    name : str
        Name of the tensor; one unknown to the spec stays whole.
    shape : sequence of int
        Global shape.
    widths : mapping from axis name to Keep
        In units; axes that are absent stay whole.

    Raises
    ------
    ConfigError
        If a Keep is not of its axis's size, or empty and no branch's.
    """
    dims = spec.dims.get(name, (WHOLE,) * len(shape))
    return tuple(_dim_keep(spec, dim, size, widths) for dim, size in zip(dims, shape, strict=True))


def _dim_keep(spec: WidthSpec, dim: Dim, size: int, widths: Mapping[str, Keep]) -> Keep:
    axis = dim.axis
    if axis is None or axis not in widths:
        return Keep.full(size)
    keep = widths[axis]
    if keep.size != spec.axes[axis]:
        raise ConfigError(f"axis {axis} has {spec.axes[axis]} units, but the choice is one of {keep.size}")
    if not keep.count and axis not in spec.branches:
        raise ConfigError(f"axis {axis} would keep none of its {keep.size} units; keep at least one")
    return dim.keep(keep)


def slice_tensor(tensor: Tensor, keeps: Sequence[Keep]) -> Tensor:
    """Return the kept part of a tensor, as a contiguous copy without autograd; the tensor is not modified.

    Single runs are views until the end, so a tensor whose every dimension keeps one run is copied once.
    """
    source = tensor.detach()
    part = source
    for dim, keep in enumerate(keeps):
        if len(keep.runs) <= 1:
            start, stop = keep.runs[0] if keep.runs else (0, 0)
            part = part.narrow(dim, start, stop - start)
    for dim, keep in enumerate(keeps):
        if len(keep.runs) > _MAX_PIECES:
            part = part.index_select(dim, torch.from_numpy(keep.indices()).to(part.device))
        elif len(keep.runs) > 1:
            part = torch.cat([part.narrow(dim, start, stop - start) for start, stop in keep.runs], dim)
    shares = part.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    return part.clone(memory_format=torch.contiguous_format) if shares else part.contiguous()
