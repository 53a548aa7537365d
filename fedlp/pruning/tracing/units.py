"""Prunable layers: layers with input units that no other part needs, and their weights as matrices.

A unit is an input of its ``readers``: OBS compensates in their weights. The tensors that
compute it (rows of producers, norms, depthwise filters) lose it without compensation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.errors import ConfigError
from fedlp.models.spec import named_tensors
from fedlp.pruning.tracing.widths import WidthSpec
from fedlp.types import PrunableLayer

_RESIDUAL = "hidden"  # language models' residual stream: norms average over it, so it is never pruned here


def find_layers(model: nn.Module, spec: WidthSpec, shared: bool = False) -> tuple[PrunableLayer, ...]:
    """Return :func:`prunable_layers`; ConfigError where there is none, which says why."""
    found = prunable_layers(model, spec, shared)
    if not found:
        why = spec.whole_line() or "no layer alone reads what another computes"
        raise ConfigError(f"{type(model).__name__} has no prunable units: {why}")
    return found


def prunable_layers(model: nn.Module, spec: WidthSpec, shared: bool = False) -> tuple[PrunableLayer, ...]:
    """Return the prunable layers, in the order of the forward pass; may be empty.

    Parameters
    ----------
    model : nn.Module
        The model that ``spec`` was traced from.
    spec : WidthSpec
        Its width axes.
    shared : bool
        Also axes that several layers read, such as the residual stream of a ResNet's stage.
    """
    readers: dict[str, list[tuple[str, int]]] = {axis: [] for axis in spec.axes}
    for path, module in model.named_modules():
        if is_reader(module):
            dim = spec.dims[f"{path}.weight"][1 - is_transposed(module)] if f"{path}.weight" in spec.dims else None
            if dim is not None and dim.axis is not None:
                readers[dim.axis].append((path, dim.entries * math.prod(module.weight.shape[2:])))
    chosen = [
        axis
        for axis, found in readers.items()
        if spec.axes[axis] > 1 and (len(found) == 1 or (shared and found and axis != _RESIDUAL)) and axis != _RESIDUAL
    ]
    if not chosen:
        return ()
    depths = _depths(chosen)
    return tuple(
        PrunableLayer(
            name=axis,
            num_units=spec.axes[axis],
            unit_size=readers[axis][0][1],
            num_params=_count_params(model, spec, axis),
            coupled=tuple(name for name, dims in spec.dims.items() if any(dim.axis == axis for dim in dims)),
            readers=tuple(path for path, _ in readers[axis]),
            depth=depth,
            least=int(axis not in spec.branches),
        )
        for axis, depth in zip(chosen, depths, strict=True)
    )


def _depths(axes: list[str]) -> Iterator[float]:
    """Yield the relative position of each axis, in [0, 1]: by its block's number if all have one, else by its own."""
    numbers = [re.search(r"(?:layers|layer|h|encoder_layer)[._](\d+)\.", axis) for axis in axes]
    found = [int(match[1]) if match else -1 for match in numbers]
    places = list(range(len(axes))) if min(found) < 0 else found
    for place in places:
        yield place / max(places[-1], 1)


def _count_params(model: nn.Module, spec: WidthSpec, axis: str) -> int:
    parameters = {name for name, tensor in named_tensors(model).items() if isinstance(tensor, nn.Parameter)}
    return sum(
        tensor.numel()
        for name, tensor in named_tensors(model).items()
        if name in parameters and any(dim.axis == axis for dim in spec.dims.get(name, ()))
    )


def is_transposed(module: nn.Module) -> bool:
    """Return whether a linear layer stores its weight as (in, out), as in GPT-2."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_reader(module: nn.Module) -> bool:
    """Return whether a module mixes its inputs by one weight matrix."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) or is_transposed(module)


def weight_matrix(module: nn.Module) -> Tensor:
    """Return a reader's weight as (out, columns), without autograd; the columns of a unit lie together."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.T if is_transposed(module) else weight.flatten(1)


@torch.no_grad()
def write_weight(module: nn.Module, matrix: Tensor, bias: Tensor | None) -> None:
    """Write a reader's weight from (out, columns) and, unless None, its bias, which is added if missing."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    values = matrix.T if is_transposed(module) else matrix.reshape(weight.shape)
    weight.copy_(values)
    if bias is not None:
        module.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)


def input_columns(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the input rows of a reader's weight matrix, (tokens, columns)."""
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        patches = F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return inputs.reshape(-1, inputs.shape[-1])


def output_rows(module: nn.Module, outputs: Tensor) -> Tensor:
    """Return a reader's outputs as (tokens, out), in the order of :func:`input_columns`."""
    if isinstance(module, nn.Conv2d):
        return outputs.flatten(2).transpose(1, 2).reshape(-1, outputs.shape[1])
    return outputs.reshape(-1, outputs.shape[-1])


def kept_columns(units: Tensor, unit_size: int) -> Tensor:
    """Return the columns of some units, unit by unit."""
    return (units[:, None] * unit_size + torch.arange(unit_size, device=units.device)).flatten()
