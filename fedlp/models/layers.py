"""Layers by name, and parameters that are frozen: for good, in a context, or in part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import Tensor, nn

from fedlp.errors import ConfigError

ROOT_LAYER = "(root)"  # the layer of tensors that the model itself owns, whose module path is empty
_NAMES_SHOWN = 12


def owner_of(tensor: str) -> str:
    """Return the path of the module that owns a tensor."""
    return tensor.rpartition(".")[0] or ROOT_LAYER


def find_frozen(model: str, parameters: Sequence[str], patterns: Sequence[str]) -> frozenset[str]:
    """Return the parameters of all layers whose names match a shell pattern.

    Raises
    ------
    ConfigError
        If a pattern matches no layer, or all parameters would be frozen.
    """
    layers = list(dict.fromkeys(map(owner_of, parameters)))
    frozen: set[str] = set()
    for pattern in patterns:
        matching = {layer for layer in layers if fnmatchcase(layer, pattern)}
        if not matching:
            known = ", ".join(layers[:_NAMES_SHOWN]) + (", ..." if len(layers) > _NAMES_SHOWN else "")
            raise ConfigError(f"model.frozen: no layer of model {model} is called {pattern}; it has {known}")
        frozen |= matching
    if len(frozen) == len(layers):
        raise ConfigError(f"model.frozen={list(patterns)} leaves nothing of model {model} to train")
    return frozenset(name for name in parameters if owner_of(name) in frozen)


def freeze(model: nn.Module, names: frozenset[str]) -> nn.Module:
    """Disable gradients of the named parameters that the model has, and return the model."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names:
            parameter.requires_grad_(False)
    return model


@contextmanager
def all_trainable(model: nn.Module) -> Iterator[None]:
    """Enable gradients of all parameters, frozen ones included, within a context."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    model.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def none_trainable(model: nn.Module) -> Iterator[None]:
    """Disable gradients of all parameters within a context."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def held_still(model: nn.Module, names: frozenset[str]) -> Iterator[list[nn.Parameter]]:
    """Disable gradients of parameters within a context; yield all other trained ones."""
    chosen = {id(tensor): tensor for name, tensor in model.named_parameters(remove_duplicate=False) if name in names}
    needed = [parameter for parameter in chosen.values() if parameter.requires_grad]
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        yield [parameter for parameter in model.parameters() if parameter.requires_grad]
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)


@contextmanager
def masked_gradients(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply gradients of some parameters by 0/1 masks within a context; weight decay still moves all entries."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    hooks = [
        parameters[name].register_hook(lambda grad, mask=mask: grad * mask)  # type: ignore[no-untyped-call]
        for name, mask in masks.items()
        if parameters[name].requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
