"""Costs of a model as a function of its widths, without building it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fedlp.models.cost import NORM_MACS, count_macs, count_module_macs
from fedlp.models.forward import forward_logits, run_copy
from fedlp.models.spec import named_tensors
from fedlp.pruning.tracing.swin import is_swin
from fedlp.pruning.tracing.units import is_reader, is_transposed
from fedlp.pruning.tracing.vision_transformer import is_vision_transformer
from fedlp.pruning.tracing.widths import WidthSpec
from fedlp.types import PRESENCE, presence

_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention", "self")
_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
_SHARED = "cpb_mlp.0"  # layer of Swin V2's position bias that all heads share
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


class Footprint:
    """Parameters and multiply-accumulates of a model as its widths change: a polynomial in the units kept.

    Every weight counts with the product of the units kept along its axes; weights on no axis are constant, unless they
    go with the last unit of a branch: then they count with its *presence*, the smaller of its units and 1.
    """

    def __init__(self, model: nn.Module, spec: WidthSpec, positions: Mapping[str, float] | None = None) -> None:
        """Describe parameters, or MACs if ``positions`` says how often each tensor's entries are used per example."""
        self._terms: dict[tuple[str, ...], float] = {}
        self._spec = spec
        for name, tensor in named_tensors(model).items():
            times = 1.0 if positions is None else positions.get(name, 0.0)
            if not isinstance(tensor, nn.Parameter) or not times:
                continue
            axes = tuple(sorted(dim.axis for dim in spec.dims.get(name, ()) if dim.axis is not None))
            share = times * tensor.numel() / math.prod(spec.axes[axis] for axis in axes)
            branch = spec.branch_of.get(name)
            axes = axes if branch is None or branch in axes else (*axes, presence(branch))
            self._terms[axes] = self._terms.get(axes, 0.0) + share

    def add(self, axis: str | None, per_unit: float, branch: str | None = None) -> None:
        """Add a cost that is constant (None) or proportional to one axis's units, while a branch is present."""
        key = () if axis is None else (axis,)
        key = key if branch is None or branch == axis else (*key, presence(branch))
        self._terms[key] = self._terms.get(key, 0.0) + per_unit

    def count(self, kept: Mapping[str, float]) -> float:
        """Return the cost for units kept of each axis; absent axes stay whole."""
        units: dict[str, float] = {**self._spec.axes, **kept}
        units |= {presence(axis): min(units[axis], 1.0) for axis in self._spec.branches}
        return sum(share * math.prod(units[axis] for axis in axes) for axes, share in self._terms.items())

    def terms(self, axes: Collection[str]) -> dict[tuple[str, ...], float]:
        """Return the coefficient of every product of some axes' units; all other axes stay whole."""
        found: dict[tuple[str, ...], float] = {}
        for key, share in self._terms.items():
            kept = tuple(axis for axis in key if axis.removeprefix(PRESENCE) in axes)
            whole = math.prod(self._spec.axes.get(axis, 1) for axis in key if axis not in kept)
            found[kept] = found.get(kept, 0.0) + share * whole
        return found


def macs_footprint(model: nn.Module, spec: WidthSpec, inputs: Tensor) -> Footprint:
    """Return the MACs of a forward pass on one example, as :func:`~fedlp.models.cost.count_macs` counts them.

    Parameters
    ----------
    inputs : (batch, ...)
        Only the shape of one example matters.
    """
    example = inputs[:1].expand(2, *inputs.shape[1:])
    positions = run_copy(model, example, _count_positions)
    if is_vision_transformer(model) or is_swin(model):
        per_head = _macs_per_head(model, spec, inputs)
        positions = {name: times for name, times in positions.items() if not name.startswith(tuple(per_head))}
    else:
        per_head = _attention_macs(model, spec, inputs.shape[-1])
    footprint = Footprint(model, spec, positions)
    for axis, per_unit in per_head.items():
        footprint.add(axis, per_unit)
    footprint.add(None, count_macs(model, inputs).forward - footprint.count({}))
    return footprint


@torch.no_grad()
def _count_positions(model: nn.Module, batch: Tensor) -> dict[str, float]:
    """Return how often the entries of each weight are used per example, of a batch of two."""
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    positions: dict[str, float] = {}

    def note(name: str, module: nn.Module, output: Tensor) -> None:
        outputs = output.shape[-1] if isinstance(module, nn.Linear) or is_transposed(module) else output.shape[1]
        per_weight = NORM_MACS if isinstance(module, _NORMS) else 1
        width = output.shape[-1] if isinstance(module, nn.LayerNorm) else outputs
        positions[name] = positions.get(name, 0.0) + per_weight * output.numel() / width / 2

    for module in [module for module in model.modules() if _counts(module, names)]:
        name = names[id(module.weight)]
        module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
    forward_logits(model.eval(), batch)
    return positions


def _counts(module: nn.Module, names: Mapping[int, str]) -> bool:
    weighs = is_reader(module) or isinstance(module, (nn.Conv2d, nn.Linear, *_NORMS))
    return weighs and id(module.weight) in names


def _macs_per_head(model: nn.Module, spec: WidthSpec, inputs: Tensor) -> dict[str, float]:
    """Return the MACs per unit of each attention of a vision transformer, all of which belong to single heads."""
    found = count_module_macs(model, inputs)
    paths = [axis for axis in spec.axes if axis.rpartition(".")[2] in _ATTENTIONS]
    return {path: (found[path] - found.get(f"{path}.{_SHARED}", 0.0)) / spec.axes[path] for path in paths}


def _attention_macs(model: nn.Module, spec: WidthSpec, tokens: int) -> dict[str, float]:
    """Return the MACs of queries times keys and of weights times values per unit of each attention axis."""
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if path and name in _ATTENTION_OUTPUTS and f"{path}.weight" in spec.dims:
            dim = spec.dims[f"{path}.weight"][1 - is_transposed(module)]
            if dim.axis is not None and dim.axis.rpartition(".")[2] in _ATTENTIONS:
                found[dim.axis] = 2.0 * tokens * tokens * dim.entries
    return found
