"""Models whose parameters take no memory until they are cut to size."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_LOCK = threading.RLock()


@contextmanager
def without_parameters() -> Iterator[None]:
    """Give modules that are built here parameters of the meta device; buffers have memory and values.

    At most one parameter has memory at a time: each is replaced as a module takes it.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None and not param.is_meta:
            module._parameters[name] = nn.Parameter(param.detach().to("meta"), param.requires_grad)

    with _LOCK:
        nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]


def allocate(model: nn.Module) -> nn.Module:
    """Give a model's parameters memory without values, in place; tied ones stay tied. Return the model."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and param.is_meta:
                if id(param) not in made:
                    made[id(param)] = nn.Parameter(torch.empty_like(param, device="cpu"), param.requires_grad)
                module._parameters[name] = made[id(param)]
    return model
