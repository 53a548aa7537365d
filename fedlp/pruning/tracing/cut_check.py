"""Check of a cut model before anything is trained: narrow models must give outputs of the whole model's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedlp.models.forward import first_line, forward_logits, run_copy
from fedlp.pruning.tracing.slicing import WidthSpec
from fedlp.types import Keep

_BATCH = 3  # a batch that no size in the code is likely to be made for
_FRACTIONS = (1 / 2, 2 / 3)  # of the units of one axis and of the next, so that what is not tied does not fit by chance

Cut = Callable[[nn.Module, WidthSpec, Mapping[str, Keep]], nn.Module]


def without_broken_axes(model: nn.Module, spec: WidthSpec, inputs: Tensor, cut: Cut) -> WidthSpec:
    """Return the axes along which a model can be cut; the others stay whole, with the error of its forward pass.

    Branches without which it fails keep a unit.

    Parameters
    ----------
    model : nn.Module
        Not touched.
    inputs : (batch, ...)
        Only the shape of one example matters.
    cut : callable
        Returns the cut model, as ``cut_model`` does.
    """

    def fault(axes: Iterable[str]) -> str:
        return _fault(model, spec, axes, inputs, cut)

    if not spec.axes or not fault(spec.axes):
        return _without_broken_branches(model, spec, inputs, cut)
    found = spec.pinned(
        {axis: f"the model cut along it fails: {line}" for axis in spec.axes if (line := fault([axis]))}
    )
    line = fault(found.axes)
    if line:
        return found.pinned(dict.fromkeys(found.axes, f"the model cut along them fails: {line}"))
    return _without_broken_branches(model, found, inputs, cut)


def _without_broken_branches(model: nn.Module, spec: WidthSpec, inputs: Tensor, cut: Cut) -> WidthSpec:
    """Return the spec with the branches without which a model runs, alone and all at once."""

    def fault(axes: Iterable[str]) -> str:
        return _fault(model, spec, axes, inputs, cut, empty=True)

    if not spec.branches or not fault(spec.branches):
        return spec
    left = {axis: names for axis, names in spec.branches.items() if not fault([axis])}
    return replace(spec, branches={} if fault(left) else left)


def _fault(
    model: nn.Module, spec: WidthSpec, axes: Iterable[str], inputs: Tensor, cut: Cut, empty: bool = False
) -> str:
    """Return the first line of what goes wrong in a forward pass of a cut model; nothing where nothing does."""
    sizes = {axis: spec.axes[axis] for axis in axes}
    counts = [0 if empty else max(1, int(_FRACTIONS[i % 2] * size)) for i, size in enumerate(sizes.values())]
    widths = {axis: Keep.first(count, size) for (axis, size), count in zip(sizes.items(), counts, strict=True)}
    batch = inputs[:1].expand(_BATCH, *inputs.shape[1:])
    whole = run_copy(model, batch, _output_shape)
    try:
        narrow = cut(model, spec, widths)
        found = run_copy(narrow, batch, _output_shape)
        if found == whole and _trains(model, batch):
            run_copy(narrow, batch, _run_in_training)
    except Exception as error:  # whatever the model's own code raises
        return first_line(error)
    return "" if found == whole else f"its outputs are {tuple(found)}, not {tuple(whole)}"


@torch.no_grad()
def _output_shape(model: nn.Module, batch: Tensor) -> torch.Size:
    return forward_logits(model.eval(), batch).shape


@torch.no_grad()
def _run_in_training(model: nn.Module, batch: Tensor) -> None:
    """Run what a model runs in training alone, such as auxiliary heads."""
    model.train()(batch)


def _trains(model: nn.Module, batch: Tensor) -> bool:
    """Return whether the whole model runs in training mode."""
    with suppress(Exception):
        run_copy(model, batch, _run_in_training)
        return True
    return False
