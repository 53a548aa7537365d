"""Rules of tracing: which axis each dimension of a value is, by the operation that made it.

A rule raises ValueError where axes cannot say what its operation does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedlp.models.dropout import ByteDropout
from fedlp.pruning.tracing.tied_axes import WHOLE, AxisDim, AxisTable

Dims = tuple[AxisDim, ...]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CHANNELWISE_MODULES = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, ByteDropout),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh),
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softplus, nn.Softsign),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
_CHANNELWISE = {
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "hardswish", "hardtanh"),
    *("sigmoid", "hardsigmoid", "tanh", "softplus", "softsign"),
    *("dropout", "dropout1d", "dropout2d", "stochastic_depth", "contiguous", "clone", "detach"),
    *("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
}
_BROADCASTING = {"add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul", "truediv", "div", "div_"}
_WITH_TENSORS = (*_CONVS, nn.Linear, *_BATCH_NORMS, nn.GroupNorm)
_KNOWN = (*_WITH_TENSORS, nn.Flatten, *_CHANNELWISE_MODULES)
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_FLATTENING, _RESHAPING = {"flatten"}, {"view", "reshape"}
FREE = "no width rule covers the parameter"


class AxisRules:
    """The axes found so far, and the rules that find more.

    Attributes
    ----------
    table : AxisTable
        All axes.
    dims : mapping from node to one dimension each
        Of the values so far.
    shapes : mapping from node to shape
        Of the values so far.
    tensor_dims : mapping from tensor name to one dimension each
        Of parameters and buffers.
    free : mapping from node to parameter name
        Values made of parameters alone, and of which.
    """

    def __init__(self, module: nn.Module, names: Mapping[int, str]) -> None:
        self.table = AxisTable()
        self.dims: dict[fx.Node, Dims] = {}
        self.tensor_dims: dict[str, Dims] = {}
        self.free: dict[fx.Node, str] = {}
        self.shapes: dict[fx.Node, torch.Size] = {}
        self._module, self._names = module, names

    def note(self, tensor: Tensor | None, *dims: AxisDim) -> None:
        """Note the dimensions of a parameter or buffer; those of one that is used twice are tied."""
        name = None if tensor is None else self._names.get(id(tensor))
        if name is not None:
            for known, dim in zip(self.tensor_dims.setdefault(name, dims), dims, strict=True):
                self.table.tie(known, dim)

    def follow(self, node: fx.Node, value: Tensor) -> Dims:
        """Return the dimensions of a node's value; ValueError where they cannot be said."""
        self.shapes[node] = value.shape
        sources = [source for source in node.all_input_nodes if source in self.dims]
        name, free = target_name(node), [self.free[source] for source in sources if source in self.free]
        if node.op == "call_module":
            return self._follow_module(node, self._module.get_submodule(name), value)
        if node.op == "get_attr":
            self.note(value, *(WHOLE,) * value.ndim)
            self.free[node] = name
        elif free and len(free) == len(sources):
            self.free[node] = free[0]
        if all(self.table.is_whole(dim) for source in sources for dim in self.dims[source]):
            return (WHOLE,) * value.ndim
        if name in _CHANNELWISE:
            return self.dims[sources[0]]
        if name in _BROADCASTING:
            return self._broadcast(node, sources, value)
        if name in _FLATTENING | _RESHAPING:
            return self._flatten(sources[0], value, _sizes(node) if name in _RESHAPING else ())
        if name == "mean":
            return self._mean(node, sources[0])
        if name == "getitem":
            return self._index(node, sources[0])
        if name == "pad":
            return self._pad(sources[0], value)
        raise ValueError

    # ------------------------------------------------------------------------------------------------------ operations
    def _broadcast(self, node: fx.Node, sources: Sequence[fx.Node], value: Tensor) -> Dims:
        result: list[AxisDim] = []
        free = next((self.free[source] for source in sources if source in self.free), "")
        reason = f"{FREE} {free}" if free else "it is combined with values that stay whole"
        for position in range(-value.ndim, 0):
            full: list[AxisDim] = []
            for source in sources:
                shape = self.shapes[source]
                if len(shape) >= -position:
                    dim = self.dims[source][position]
                    if shape[position] == value.shape[position]:
                        full.append(dim)
                    else:
                        self.table.keep_whole(dim)
            for other in full[1:]:
                self.table.tie(full[0], other, reason)
            result.append(full[0])
        return tuple(result)

    def _flatten(self, source: fx.Node, value: Tensor, sizes: Sequence[Any] = ()) -> Dims:
        """Follow a flattening; ``sizes`` are those that the code asks for."""
        shape, dims = self.shapes[source], self.dims[source]
        for size, dim in zip(sizes, dims, strict=False):
            if isinstance(size, int) and size >= 0 and not self.table.is_whole(dim):
                raise ValueError(f"it asks for {size} entries; x.flatten(1) takes any number")
        if value.shape[: len(shape)] == shape and math.prod(value.shape[len(shape) :]) == 1:
            return dims + (WHOLE,) * (value.ndim - len(shape))
        whole = all(self.table.is_whole(dim) for dim in (dims[0], *dims[2:]))
        if not whole or value.shape != (shape[0], math.prod(shape[1:])):
            raise ValueError("only flattening from dimension 1 on has a rule")
        axis, entries = dims[1]
        return dims[0], (axis, entries * math.prod(shape[2:]))

    def _mean(self, node: fx.Node, source: fx.Node) -> Dims:
        dims = self.dims[source]
        over = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        keepdim = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        listed = over if isinstance(over, tuple | list) else (over,)
        reduced = {index % len(dims) for index in listed if isinstance(index, int)}
        if len(reduced) != len(listed):
            raise ValueError("the dimensions that it reduces are not constant")
        if not all(self.table.is_whole(dims[index]) for index in reduced):
            raise ValueError("it mixes units")
        return tuple(dim for index, dim in enumerate(dims) if keepdim or index not in reduced)

    def _index(self, node: fx.Node, source: fx.Node) -> Dims:
        """Slices keep their axes if they leave the dimension's units alone; None adds a dimension."""
        dims, shape, found = list(self.dims[source]), list(self.shapes[source]), list[AxisDim]()
        for item in node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],):
            if item is None:
                found.append(WHOLE)
                continue
            dim, size = dims.pop(0), shape.pop(0)
            if not isinstance(item, slice):
                raise ValueError("it picks single entries")
            if not self.table.is_whole(dim) and len(range(size)[item]) != size:
                raise ValueError("it slices units")
            found.append(dim)
        return (*found, *dims)

    def _pad(self, source: fx.Node, value: Tensor) -> Dims:
        """A dimension that is padded stays whole."""
        for dim, before, after in zip(self.dims[source], self.shapes[source], value.shape, strict=True):
            if before != after:
                self.table.keep_whole(dim)
        return tuple(
            WHOLE if before != after else dim
            for dim, before, after in zip(self.dims[source], self.shapes[source], value.shape, strict=True)
        )

    # --------------------------------------------------------------------------------------------------------- modules
    def _follow_module(self, node: fx.Node, module: nn.Module, value: Tensor) -> Dims:
        source = next((source for source in node.all_input_nodes if source in self.dims), None)
        if source is None or not self._is_known(module):
            raise ValueError
        dims, path = self.dims[source], str(node.target)
        if isinstance(module, _CONVS):
            return (dims[0], self._conv(path, module, dims[1]), *dims[2:])
        if isinstance(module, nn.Linear):
            outputs = (self.table.start(path, module.out_features), 1)
            self.note(module.weight, outputs, dims[-1])
            self.note(module.bias, outputs)
            return (*dims[:-1], outputs)
        if isinstance(module, _BATCH_NORMS):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                self.note(tensor, dims[1])
            return dims
        if isinstance(module, nn.GroupNorm):
            groups = (self.table.start(path, module.num_groups), module.num_channels // module.num_groups)
            self.table.tie(dims[1], groups)
            self.note(module.weight, groups)
            self.note(module.bias, groups)
            return dims
        return self._flatten(source, value) if isinstance(module, nn.Flatten) else dims

    def _is_known(self, module: nn.Module) -> bool:
        """Return whether a rule covers a module: one of torch's, with its own forward pass and no further tensors."""
        if type(module).__name__ == "StochasticDepth":
            return True
        kind = next((kind for kind in _KNOWN if isinstance(module, kind)), None)
        if kind is None or type(module).forward is not kind.forward:
            return False
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        weight = tensors.get("weight")
        if kind in (*_CONVS, nn.Linear, nn.GroupNorm) and (weight is None or id(weight) not in self._names):
            return False
        return tensors.keys() <= _TENSORS

    def _conv(self, path: str, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: AxisDim) -> AxisDim:
        spatial = (WHOLE,) * (conv.weight.ndim - 2)
        if conv.groups == 1:
            outputs = (self.table.start(path, conv.out_channels), 1)
            self.note(conv.weight, outputs, inputs, *spatial)
        else:
            group = self.table.start(path, conv.groups)
            self.table.tie(inputs, (group, conv.in_channels // conv.groups))
            outputs = (group, conv.out_channels // conv.groups)
            self.note(conv.weight, outputs, WHOLE, *spatial)
        self.note(conv.bias, outputs)
        return outputs


def target_name(node: fx.Node) -> str:
    """Return the name of a node's module, function or method."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _sizes(node: fx.Node) -> Sequence[Any]:
    """Return the sizes that a view or reshape is given: numbers, or nodes that compute them."""
    given = [*node.args[1:], *(value for name, value in node.kwargs.items() if name not in ("input", "self"))]
    first = given[0] if given else ()
    return first if isinstance(first, tuple | list) else given
