"""Fully connected networks of several clients at once: batched products, without ``vmap`` and autograd.

One step of a small network costs less than the bookkeeping of autograd: written out, a stack of softmax regressions
takes a fifth of the time. Gradients are those of autograd up to the order of additions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_RELU = (F.relu, torch.relu, "relu", "relu_")
_FLATTEN = (torch.flatten, "flatten")


@dataclass(frozen=True, slots=True)
class ChainLink:
    """A linear layer: its path in the model, whether it has a bias, and whether a ReLU follows."""

    path: str
    has_bias: bool
    rectifies: bool

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return f"{self.path}.weight"

    @property
    def bias(self) -> str:
        """Name of the bias."""
        return f"{self.path}.bias"


Chain = tuple[ChainLink, ...]
"""Linear layers in the order of a forward pass, with or without ReLUs between them."""


def find_chain(model: nn.Module) -> Chain:
    """Return the layers of a network that only flattens, multiplies and rectifies; empty for any other network."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return ()
    try:
        nodes = list(fx.Tracer().trace(model).nodes)
    except Exception:  # control flow that depends on values, or whatever else cannot be traced
        return ()
    is_line = all(node.all_input_nodes == [before] for before, node in pairwise(nodes))
    if not is_line or nodes[0].op != "placeholder" or nodes[-1].op != "output" or nodes[-1].args[0] is not nodes[-2]:
        return ()
    links: list[ChainLink] = []
    for node in nodes[1:-1]:
        if not _append(model, node, links):
            return ()
    paths = {link.path for link in links}
    count = sum(1 for _ in model.named_parameters(remove_duplicate=False))
    whole = len(paths) == len(links) and count == sum(1 + link.has_bias for link in links)
    return tuple(links) if links and whole and not list(model.buffers()) and not _are_tied(model) else ()


def _append(model: nn.Module, node: fx.Node, links: list[ChainLink]) -> bool:
    """Add an operation to the layers before it; return whether it belongs into a chain."""
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if type(module) is nn.Linear:
        links.append(ChainLink(str(node.target), module.bias is not None, False))
        return True
    if node.target in _RELU or type(module) is nn.ReLU:
        if links:
            links[-1] = ChainLink(links[-1].path, links[-1].has_bias, True)
        return bool(links)
    if type(module) is nn.Flatten:
        return not links and (module.start_dim, module.end_dim) == (1, -1)
    if node.target in _FLATTEN:
        rest = [*node.args[1:], *node.kwargs.values()]
        return not links and rest in ([1], [1, -1]) and set(node.kwargs) <= {"start_dim", "end_dim"}
    return type(module) is nn.Identity


def _are_tied(model: nn.Module) -> bool:
    return len(list(model.parameters())) != len(list(model.named_parameters(remove_duplicate=False)))


class ChainPass:
    """Forward and backward pass of a chain.

    Parameters
    ----------
    values : mapping from name to Tensor
        Parameters of all clients, (clients, ...), or of one network for all of them.
    trained : collection of str
        Names of the parameters whose gradients are wanted; those are of all clients.
    """

    def __init__(self, chain: Chain, values: Mapping[str, Tensor], trained: Collection[str]) -> None:
        self._chain, self._values, self._trained = chain, values, trained
        self._inputs: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs, (clients, rows, outputs), of inputs (clients, rows, ...)."""
        x = inputs.reshape(*inputs.shape[:2], math.prod(inputs.shape[2:]))
        for link in self._chain:
            self._inputs.append(x)
            weight = self._values[link.weight]
            bias = self._values[link.bias] if link.has_bias else None
            x = _linear(x, weight, bias)
            if link.rectifies:
                x = x.relu_()
        self._inputs.append(x)
        return x

    def backward(self, gradient: Tensor) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Yield name and factors of each trained parameter's gradient, from the last layer to the first.

        The gradient of a weight is ``first.mT @ second``, that of a bias the sum of ``first`` over rows, with None for
        ``second``. A parameter may be changed once it was yielded.

        Parameters
        ----------
        gradient : (clients, rows, outputs)
            Of the losses' sum with respect to the outputs.
        """
        first = min((i for i, x in enumerate(self._chain) if self._is_trained(x)), default=len(self._chain))
        for number in reversed(range(first, len(self._chain))):
            link, inputs = self._chain[number], self._inputs[number]
            if link.rectifies:
                gradient = torch.ops.aten.threshold_backward(gradient, self._inputs[number + 1], 0)
            before = gradient
            if number > first:
                weight = self._values[link.weight]
                gradient = gradient @ weight if weight.ndim == 2 else gradient.bmm(weight)
            if link.weight in self._trained:
                yield link.weight, before, inputs
            if link.has_bias and link.bias in self._trained:
                yield link.bias, before, None

    def _is_trained(self, link: ChainLink) -> bool:
        return link.weight in self._trained or (link.has_bias and link.bias in self._trained)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the products of a layer; weight and bias of each client, or of all."""
    if weight.ndim == 2:
        x = x @ weight.mT
        return x if bias is None else x.add_(bias if bias.ndim == 1 else bias[:, None])
    if bias is None:
        return x.bmm(weight.mT)
    return torch.baddbmm(bias if bias.ndim == 1 else bias[:, None], x, weight.mT)


def gradient_of(first: Tensor, second: Tensor | None) -> Tensor:
    """Return the gradient of a parameter of all clients, (clients, ...), from its factors."""
    return first.sum(dim=1) if second is None else first.mT.bmm(second)


@torch.no_grad()
def descend(parameter: Tensor, first: Tensor, second: Tensor | None, lr: float) -> None:
    """Move a parameter of all clients against its gradient, whose factors are given; the gradient is not stored."""
    if second is None:
        parameter.sub_(first.sum(dim=1), alpha=lr)
    else:
        parameter.baddbmm_(first.mT, second, alpha=-lr)
