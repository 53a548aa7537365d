"""Layers of a model, and their order in a forward pass."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layer:
    """FedLP's unit of upload: the tensors that one module owns, buffers included.

    Attributes
    ----------
    name : str
        The module's path in the model.
    tensors : tuple of str
        Names in the model's ``state_dict``, in its order.
    num_params : int
        Trainable numbers in the layer (buffers not counted).
    """

    name: str
    tensors: tuple[str, ...]
    num_params: int


def order_layers(layers: Sequence[Layer], called: Sequence[str], tied: Collection[str]) -> tuple[Layer, ...]:
    """Return the layers in the order of their first use, up to the first that is used twice.

    Parameters
    ----------
    called : sequence of str
        Paths of the modules that a forward pass calls, in order; the first one is the whole model's, "". A layer whose
        own module is not called (others read its tensors) is used where the closest module around it is called.
    tied : collection of str
        Tensors with several names.
    """
    times, places = Counter(called), {path: place for place, path in reversed(list(enumerate(called)))}
    users = {layer.name: _user(layer, places) for layer in layers}

    def is_used_once(layer: Layer) -> bool:
        return times[users[layer.name]] == 1 and not any(name in tied for name in layer.tensors)

    return tuple(itertools.takewhile(is_used_once, sorted(layers, key=lambda layer: places[users[layer.name]])))


def _user(layer: Layer, called: Collection[str]) -> str:
    """Return the path of the module that reads the layer's tensors."""
    path = layer.tensors[0].rpartition(".")[0]
    while path not in called:
        path = path.rpartition(".")[0]
    return path
