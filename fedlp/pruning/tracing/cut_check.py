"""Check of a cut model before anything is trained: narrow models must give outputs of the whole model's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from fedlp.models.spec import first_line, forward_logits, run_copy
from fedlp.pruning.tracing.slicing import WidthSpec
from fedlp.types import Keep

_BATCH = 3  # a batch that no size in the code is likely to be made for
_FRACTIONS = (1 / 2, 2 / 3)  # of the units of one axis and of the next, so that what is not tied does not fit by chance

Cut = Callable[[nn.Module, WidthSpec, Mapping[str, Keep]], nn.Module]


def without_broken_axes(model: nn.Module, spec: WidthSpec, inputs: Tensor, cut: Cut) -> WidthSpec:
    """Return the axes along which a model can be cut; the others stay whole, with the error of its forward pass.

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
        return spec
    found = spec.pinned(
        {axis: f"the model cut along it fails: {line}" for axis in spec.axes if (line := fault([axis]))}
    )
    line = fault(found.axes)
    return found.pinned(dict.fromkeys(found.axes, f"the model cut along them fails: {line}")) if line else found


def _fault(model: nn.Module, spec: WidthSpec, axes: Iterable[str], inputs: Tensor, cut: Cut) -> str:
    """Return the first line of what goes wrong in a forward pass of a cut model; nothing where nothing does."""
    sizes = {axis: spec.axes[axis] for axis in axes}
    counts = [max(1, int(_FRACTIONS[i % 2] * size)) for i, size in enumerate(sizes.values())]
    widths = {axis: Keep.first(count, size) for (axis, size), count in zip(sizes.items(), counts, strict=True)}
    try:
        whole = _output_shape(model, inputs)
        found = _output_shape(cut(model, spec, widths), inputs)
    except Exception as error:  # whatever the model's own code raises
        return first_line(error)
    return "" if found == whole else f"its outputs are {tuple(found)}, not {tuple(whole)}"


@torch.no_grad()
def _output_shape(model: nn.Module, inputs: Tensor) -> torch.Size:
    """Return the shape of the outputs of a batch, found without computing them unless operators need values."""
    batch = inputs[:1].expand(_BATCH, *inputs.shape[1:])
    return run_copy(model, batch, lambda copied, example: forward_logits(copied.eval(), example).shape)
