"""Symbolic trace of any model; a module that cannot be traced is one step of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from fedlp.models.forward import first_line

__all__ = ["trace_modules"]


def trace_modules(model: nn.Module) -> tuple[fx.Graph, Mapping[str, str]]:
    """Return the graph of a model, and why modules within it could not be traced, by path.

    A module without children is one step, and so is one that cannot be traced, such as one whose forward pass branches
    on values. The innermost such module is left out of the trace, then the next, until the rest can be traced.

    The model's class may be changed to one that takes its inputs alone.

    Raises
    ------
    Exception
        That of the model's own forward pass, if it cannot be traced itself.
    """
    failed: dict[str, str] = {}
    _take_inputs_alone(model)
    while True:
        tracer = _Tracer(failed)
        try:
            return tracer.trace(model), failed
        except Exception as error:  # anything that a forward pass does with values which are not there
            if not tracer.culprit or tracer.culprit in failed:
                raise
            failed[tracer.culprit] = first_line(error)


def _take_inputs_alone(model: nn.Module) -> None:
    """Let a model's forward pass take its inputs alone: in the trace its other parameters have their defaults."""
    base = type(model)
    if len(inspect.signature(base.forward).parameters) > 2:  # self, inputs and more

        def forward(self: nn.Module, inputs: Any) -> Any:
            return base.forward(self, inputs)

        model.__class__ = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


class _Tracer(fx.Tracer):
    """Traces down to modules without children, also users' own, and to modules that are known to fail."""

    def __init__(self, failed: Mapping[str, str]) -> None:
        super().__init__()
        self._failed = failed
        self.culprit = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = super().is_leaf_module(m, module_qualified_name) or not any(m.children())
        return known or module_qualified_name in self._failed

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.culprit = self.culprit or self.path_of_module(m)
            raise
