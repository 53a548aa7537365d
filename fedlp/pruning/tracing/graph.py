"""Width axes of classifiers, found by following shapes through a symbolic trace.

Every convolution and linear layer starts an axis of its outputs; normalisation, activations and pools pass it on;
additions, depthwise and grouped convolutions tie axes together; flattening gives each unit more entries. Inputs and
class outputs always stay whole. Other operations (concatenation, channel shuffles, attention) are an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from fedlp.errors import ConfigError
from fedlp.models.dropout import ByteDropout
from fedlp.models.spec import first_line, named_tensors, shapes_only
from fedlp.pruning.tracing.slicing import WidthSpec
from fedlp.pruning.tracing.tied_axes import WHOLE, AxisDim, AxisTable

_Dims = tuple[AxisDim, ...]

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
_RESHAPING = {"flatten", "view", "reshape"}


def trace_classifier(model: nn.Module, inputs: Tensor) -> WidthSpec:
    """Return the width axes of a convolutional or fully connected classifier.

    Parameters
    ----------
    model : nn.Module
        Symbolically traceable; not touched.
    inputs : (batch, ...)
        Only their shape matters.

    Raises
    ------
    ConfigError
        If the model cannot be traced, or has an operation that ties units in a way that axes cannot express; names
        the node.
    """
    with shapes_only(model, inputs) as (shapes, example):
        names = {id(tensor): name for name, tensor in named_tensors(shapes).items()}
        try:
            graph = _Tracer().trace(shapes.eval())
        except (fx.proxy.TraceError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ConfigError(f"width slicing cannot trace {type(model).__name__}: {first_line(error)}") from error
        finder = _AxisFinder(fx.GraphModule(shapes, graph), names)
        finder.run(example)
    dims = {
        name: tuple(finder.table.named(dim) for dim in finder.tensor_dims.get(name, (WHOLE,) * tensor.ndim))
        for name, tensor in named_tensors(model).items()
    }
    return WidthSpec(finder.table.final_sizes(), dims)


class _Tracer(fx.Tracer):
    """Tracer down to modules without children, user modules included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or not any(m.children())


class _AxisFinder(fx.Interpreter):
    """Runs a traced model on shapes and notes which axis each dimension of every value and tensor is."""

    def __init__(self, module: fx.GraphModule, names: dict[int, str]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self.table = AxisTable()
        self.tensor_dims: dict[str, _Dims] = {}
        self._names = names
        self._dims: dict[fx.Node, _Dims] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        try:
            if n.op == "output":
                for source in n.all_input_nodes:
                    self._keep_whole(source)
            elif isinstance(value, Tensor):
                self._dims[n] = self._follow(n, value)
            elif isinstance(value, tuple | list) and any(isinstance(item, Tensor) for item in value):
                raise ValueError("it gives several tensors")
        except ValueError as error:
            raise ConfigError(
                f"width slicing cannot express {n.op} {_target_name(n)} at node {n.name}: {error}; choose another "
                "model or a strategy without width slices"
            ) from error
        return value

    # ------------------------------------------------------------------------------------------------------ operations
    def _follow(self, node: fx.Node, value: Tensor) -> _Dims:
        """Return the dimensions of a node's value; ValueError if they cannot be said."""
        sources = [source for source in node.all_input_nodes if source in self._dims]
        name = _target_name(node)
        if node.op == "call_module":
            return self._follow_module(node, self.module.get_submodule(str(node.target)), value)
        if all(self.table.is_whole(dim) for source in sources for dim in self._dims[source]):
            return (WHOLE,) * value.ndim
        if name in _CHANNELWISE:
            return self._dims[sources[0]]
        if name in _BROADCASTING:
            return self._broadcast(sources, value)
        if name in _RESHAPING:
            return self._flatten(sources[0], value)
        if name == "mean":
            return self._mean(node, sources[0])
        if name == "getitem":
            return self._index(node, sources[0])
        if name == "pad":
            return self._pad(sources[0], value)
        raise ValueError("there is no rule for it")

    def _broadcast(self, sources: Sequence[fx.Node], value: Tensor) -> _Dims:
        result: list[AxisDim] = []
        for position in range(-value.ndim, 0):
            full: list[AxisDim] = []
            for source in sources:
                shape = self.env[source].shape
                if len(shape) >= -position:
                    dim = self._dims[source][position]
                    if shape[position] == value.shape[position]:
                        full.append(dim)
                    else:
                        self.table.keep_whole(dim)
            for other in full[1:]:
                self.table.tie(full[0], other)
            result.append(full[0])
        return tuple(result)

    def _flatten(self, source: fx.Node, value: Tensor) -> _Dims:
        shape, dims = self.env[source].shape, self._dims[source]
        if value.shape == shape:
            return dims
        whole = all(self.table.is_whole(dim) for dim in (dims[0], *dims[2:]))
        if not whole or value.shape != (shape[0], math.prod(shape[1:])):
            raise ValueError("only flattening from dimension 1 on has a rule")
        axis, entries = dims[1]
        return dims[0], (axis, entries * math.prod(shape[2:]))

    def _mean(self, node: fx.Node, source: fx.Node) -> _Dims:
        dims = self._dims[source]
        over = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        keepdim = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        listed = over if isinstance(over, tuple | list) else (over,)
        reduced = {index % len(dims) for index in listed if isinstance(index, int)}
        if len(reduced) != len(listed):
            raise ValueError("the dimensions that it reduces are not constant")
        if not all(self.table.is_whole(dims[index]) for index in reduced):
            raise ValueError("it mixes units")
        return tuple(dim for index, dim in enumerate(dims) if keepdim or index not in reduced)

    def _index(self, node: fx.Node, source: fx.Node) -> _Dims:
        """Slices keep their axes if they leave the dimension's units alone."""
        dims, shape = self._dims[source], self.env[source].shape
        items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if not all(isinstance(item, slice) for item in items):
            raise ValueError("it picks single entries")
        for dim, size, item in zip(dims, shape, items, strict=False):
            if not self.table.is_whole(dim) and len(range(size)[item]) != size:
                raise ValueError("it slices units")
        return dims

    def _pad(self, source: fx.Node, value: Tensor) -> _Dims:
        """A dimension that is padded stays whole."""
        for dim, before, after in zip(self._dims[source], self.env[source].shape, value.shape, strict=True):
            if before != after:
                self.table.keep_whole(dim)
        return tuple(
            WHOLE if before != after else dim
            for dim, before, after in zip(self._dims[source], self.env[source].shape, value.shape, strict=True)
        )

    # --------------------------------------------------------------------------------------------------------- modules
    def _follow_module(self, node: fx.Node, module: nn.Module, value: Tensor) -> _Dims:
        source = node.all_input_nodes[0]
        dims, path = self._dims[source], str(node.target)
        if isinstance(module, _CONVS):
            return (dims[0], self._conv(path, module, dims[1]), *dims[2:])
        if isinstance(module, nn.Linear):
            outputs = (self.table.start(path, module.out_features), 1)
            self._note(module.weight, outputs, dims[-1])
            self._note(module.bias, outputs)
            return (*dims[:-1], outputs)
        if isinstance(module, _BATCH_NORMS):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                self._note(tensor, dims[1])
            return dims
        if isinstance(module, nn.GroupNorm) and module.affine:
            groups = (self.table.start(path, module.num_groups), module.num_channels // module.num_groups)
            self.table.tie(dims[1], groups)
            self._note(module.weight, groups)
            self._note(module.bias, groups)
            return dims
        if isinstance(module, nn.Flatten):
            return self._flatten(source, value)
        if isinstance(module, _CHANNELWISE_MODULES) or type(module).__name__ == "StochasticDepth":
            return dims
        if all(self.table.is_whole(dim) for dim in dims):
            return (WHOLE,) * value.ndim
        raise ValueError(f"there is no rule for {type(module).__name__}")

    def _conv(self, path: str, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: AxisDim) -> AxisDim:
        spatial = (WHOLE,) * (conv.weight.ndim - 2)
        if conv.groups == 1:
            outputs = (self.table.start(path, conv.out_channels), 1)
            self._note(conv.weight, outputs, inputs, *spatial)
        else:
            group = self.table.start(path, conv.groups)
            self.table.tie(inputs, (group, conv.in_channels // conv.groups))
            outputs = (group, conv.out_channels // conv.groups)
            self._note(conv.weight, outputs, WHOLE, *spatial)
        self._note(conv.bias, outputs)
        return outputs

    def _note(self, tensor: Tensor | None, *dims: AxisDim) -> None:
        """Note the dimensions of a parameter or buffer; those of one that is used twice are tied."""
        name = None if tensor is None else self._names.get(id(tensor))
        if name is not None:
            for known, dim in zip(self.tensor_dims.setdefault(name, dims), dims, strict=True):
                self.table.tie(known, dim)

    def _keep_whole(self, node: fx.Node) -> None:
        for dim in self._dims[node]:
            self.table.keep_whole(dim)


def _target_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
