"""Layers by their names: which tensors a module owns, and which layers keep the values that they have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from fedlp.errors import ConfigError

ROOT_LAYER = "(root)"  # the layer of tensors that the model itself owns, whose module path is empty
_NAMES_SHOWN = 12


def owner_of(tensor: str) -> str:
    """Return the path of the module that owns a tensor."""
    return tensor.rpartition(".")[0] or ROOT_LAYER


def find_frozen(model: str, parameters: Sequence[str], patterns: Sequence[str]) -> frozenset[str]:
    """Return the parameters of all layers whose names match a pattern, as file names match one of a shell.

    Raises
    ------
    ConfigError
        Where a pattern matches no layer, or all parameters would be frozen.
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
    """Let the named parameters need no gradients, where the model has them, and return the model."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names:
            parameter.requires_grad_(False)
    return model


@contextmanager
def all_trainable(model: nn.Module) -> Iterator[None]:
    """Let every parameter need gradients for a while, frozen ones too."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    model.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
