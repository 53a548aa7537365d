"""Width axes of classifiers, found by following shapes through a symbolic trace.

Every convolution and linear layer starts an axis of its outputs; normalisation, activations and pools pass it on;
additions, depthwise and grouped convolutions tie axes together; flattening gives each unit more entries. Inputs and
class outputs always stay whole.

What no rule covers stays whole, and so does every axis that it reads or is combined with: a module of one's own, an
operation such as concatenation, a free parameter, a size that the code names as a number. It gets and gives the same
shapes however narrow the rest is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedlp.models.forward import first_line, run_copy
from fedlp.models.spec import named_tensors
from fedlp.pruning.tracing import slicing
from fedlp.pruning.tracing.residual_branches import residual_branches
from fedlp.pruning.tracing.rules import FREE, AxisRules, Dims, target_name
from fedlp.pruning.tracing.slicing import WidthSpec
from fedlp.pruning.tracing.symbolic import trace_modules
from fedlp.pruning.tracing.tied_axes import WHOLE

_SIMPLE = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.layout)


def trace_classifier(model: nn.Module, inputs: Tensor) -> WidthSpec:
    """Return the width axes of a convolutional or fully connected classifier; none where it cannot be traced at all.

    Parameters
    ----------
    model : nn.Module
        Not touched.
    inputs : (batch, ...)
        Only their shape matters, unless an operator of the model needs values.
    """
    try:
        return run_copy(model, inputs, lambda copied, example: _find_axes(copied, example, model))
    except Exception as error:  # whatever the model's own code raises
        dims = {name: (slicing.WHOLE,) * tensor.ndim for name, tensor in named_tensors(model).items()}
        return WidthSpec({}, dims, {type(model).__name__: f"it cannot be traced ({first_line(error)})"})


@torch.no_grad()
def _find_axes(copied: nn.Module, example: Tensor, model: nn.Module) -> WidthSpec:
    """Return the axes of a copy of a model, with or without values."""
    names = {id(tensor): name for name, tensor in named_tensors(copied).items()}
    graph, untraced = trace_modules(copied.eval())
    finder = _AxisFinder(fx.GraphModule(copied, graph), names, untraced, type(model).__name__)
    finder.run(example)
    rules = finder.rules
    dims = {
        name: tuple(rules.table.named(dim) for dim in rules.tensor_dims.get(name, (WHOLE,) * tensor.ndim))
        for name, tensor in named_tensors(model).items()
    }
    spec = WidthSpec(rules.table.final_sizes(), dims, {**finder.whole, **rules.table.reasons()})
    return replace(spec, branches=residual_branches(graph, copied, spec))


class _AxisFinder(fx.Interpreter):
    """Runs a traced model and notes which axis each dimension of every value and tensor is.

    Attributes
    ----------
    whole : mapping from module or parameter to reason
        What stays whole because no rule covers it.
    """

    def __init__(self, module: fx.GraphModule, names: dict[int, str], untraced: Mapping[str, str], root: str) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self.rules = AxisRules(module, names)
        self.whole: dict[str, str] = {}
        self._untraced, self._root = untraced, root

    def run_node(self, n: fx.Node) -> Any:
        value, rules = super().run_node(n), self.rules
        if n.op == "output":
            for source in n.all_input_nodes:
                for dim in rules.dims.get(source, ()):
                    rules.table.keep_outputs(dim)
        elif isinstance(value, Tensor):
            start = rules.table.num_axes
            try:
                rules.dims[n] = self._follow(n, value)
            except (ValueError, TypeError, IndexError) as error:
                rules.table.keep_whole_from(start)
                rules.dims[n] = self._keep_whole(n, value.ndim, str(error) if isinstance(error, ValueError) else "")
        elif not _is_simple(value):
            self._keep_whole(n, 0, "it gives several values")
        return value

    def _follow(self, node: fx.Node, value: Tensor) -> Dims:
        if node.op == "call_module" and str(node.target) in self._untraced:
            raise ValueError(f"it cannot be traced: {self._untraced[str(node.target)]}")
        return self.rules.follow(node, value)

    def _keep_whole(self, node: fx.Node, ndim: int, why: str) -> Dims:
        """Keep whole what a node reads, with its module's own tensors; return the dimensions of its value."""
        rules, reason = self.rules, self._reason(node, why)
        cuts = [dim for source in node.all_input_nodes for dim in rules.dims.get(source, ())]
        is_said = any(not rules.table.is_whole(dim) for dim in cuts)
        for dim in cuts:
            rules.table.keep_whole(dim, reason)
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            tensors = [*module.parameters(), *module.buffers()]
            for tensor in tensors:
                rules.note(tensor, *(WHOLE,) * tensor.ndim)
            if is_said or (tensors and not type(module).__module__.startswith("torch.nn")):
                self.whole.setdefault(str(node.target), reason)
        elif is_said:
            free = [rules.free[source] for source in node.all_input_nodes if source in rules.free]
            self.whole.update(dict.fromkeys(free, reason))
        return (WHOLE,) * ndim

    def _reason(self, node: fx.Node, why: str) -> str:
        name, detail = target_name(node), f": {why}" if why else ""
        if node.op == "call_module":
            name = type(self.module.get_submodule(name)).__name__
            return f"no width rule covers {name}{detail}"
        if why.startswith(FREE):
            return why
        owners = list(node.meta.get("nn_module_stack", {}).values())
        return f"no width rule covers {name} in {owners[-1][1].__name__ if owners else self._root}{detail}"


def _is_simple(value: Any) -> bool:
    """Return whether a value holds no tensors."""
    return isinstance(value, _SIMPLE) or (isinstance(value, tuple | list) and all(map(_is_simple, value)))
