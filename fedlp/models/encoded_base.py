r"""Frozen layers whose weights stay encoded in memory, as the base of QLoRA (Dettmers et al., NeurIPS 2023).

A linear layer widens a few rows of its weight at a time to float32, in the forward and again in the backward pass,
which keeps no copy of them. With W the widened weight and g the gradient of the output,

.. math:: y = x W^\top + b, \qquad \partial x = g W .

The weight has no gradient. Results are those of the widened weight: bit for bit where it is widened whole, else
up to the order of a sum in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedlp.models.adapters import LoraLinear
from fedlp.models.spec import named_tensors

WIDENING_BYTES = 6  # of an entry that is being widened: its value, and the index of its pair
_KINDS = (nn.Linear, LoraLinear, nn.Embedding)


class Weight(Protocol):
    """Protocol of an encoded weight, (out, in).

    Attributes
    ----------
    step : int
        Rows to widen at once.
    """

    shape: tuple[int, int]
    step: int
    dtype: torch.dtype
    device: torch.device

    def rows(self, start: int, stop: int) -> Tensor:
        """Return consecutive rows, widened."""

    def take(self, index: Tensor) -> Tensor:
        """Return the rows at some positions, widened."""


class EncodedLinear(nn.Linear):
    """Linear layer with an encoded weight; its bias is shared with the layer that it replaces."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight: Any = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output."""
        return encoded_linear(input, self.weight, self.bias)


class EncodedLoraLinear(LoraLinear):
    """Linear layer with an adapter, on an encoded weight."""

    def __init__(self, linear: LoraLinear) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in vars(linear).items() if not name.startswith("_")})
        self.bias, self.lora_a, self.lora_b = linear.bias, linear.lora_a, linear.lora_b
        self.weight: Any = None

    def base(self, input: Tensor) -> Tensor:
        """Return the output without the adapter's."""
        return encoded_linear(input, self.weight, self.bias)


class EncodedEmbedding(nn.Embedding):
    """Embedding with an encoded weight."""

    def __init__(self, embedding: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in vars(embedding).items() if not name.startswith("_")})
        self.weight: Any = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the tokens."""
        found: Tensor = self.weight.take(input)
        return found


def encoded_linear(input: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return the product with an encoded weight, which is widened a few rows at a time.

    Parameters
    ----------
    input : (..., in)
    weight : Weight
        (out, in); has no gradient.
    bias : (out,) or None

    Returns
    -------
    (..., out)
    """
    found: Tensor = _EncodedLinear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return found


class _EncodedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.shape, ctx.dtype = weight, input.shape, input.dtype
        found: Tensor | None = None
        for start, stop in _spans(weight):
            part = F.linear(input, weight.rows(start, stop), None if bias is None else bias[start:stop])
            if stop - start == weight.shape[0]:
                return part
            if found is None:
                found = part.new_empty(*part.shape[:-1], weight.shape[0])
            found[..., start:stop] = part
        assert found is not None
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        rows, total = gradient.reshape(-1, gradient.shape[-1]), None
        for start, stop in _spans(ctx.weight) if ctx.needs_input_grad[0] else ():
            part = rows[:, start:stop] @ ctx.weight.rows(start, stop).to(rows.dtype)
            total = part if total is None else total.add_(part)
        moved = None if total is None else total.view(ctx.shape).to(ctx.dtype)
        return moved, None, rows.sum(dim=0) if ctx.needs_input_grad[2] else None


def _spans(weight: Weight) -> Iterator[tuple[int, int]]:
    """Yield start and end of the rows that are widened at once."""
    count = weight.shape[0]
    return ((start, min(start + weight.step, count)) for start in range(0, count, weight.step))


def encodable(model: nn.Module, frozen: Collection[str]) -> frozenset[str]:
    """Return the frozen weights that can stay encoded: those of linear layers and embeddings alone."""
    return frozenset(name for name, owners in _owners(model).items() if name in frozen and _can_stay(owners))


def _owners(model: nn.Module) -> dict[str, list[tuple[str, nn.Module, str]]]:
    """Return path, module and attribute of every owner of each parameter, by its first name."""
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    found: dict[str, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(names[id(parameter)], []).append((path, module, attribute))
    return found


def _can_stay(owners: list[tuple[str, nn.Module, str]]) -> bool:
    return all(type(m) in _KINDS and a == "weight" and getattr(m, "max_norm", None) is None for _, m, a in owners)


def encode_base(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Replace the layers of some weights, in place, by ones whose weights are encoded; return the model.

    They have no weights before :func:`hold_base`.
    """
    for name, owners in _owners(model).items():
        for path, module, _ in owners if name in names else ():
            made = _encoded(module)
            made.encoded_name = name  # type: ignore[assignment]
            made.train(module.training)
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, made)
    return model


def _encoded(module: nn.Module) -> nn.Module:
    if isinstance(module, LoraLinear):
        return EncodedLoraLinear(module)
    return EncodedLinear(module) if isinstance(module, nn.Linear) else EncodedEmbedding(module)  # type: ignore[arg-type]


def hold_base(model: nn.Module, weight: Callable[[str], Weight]) -> frozenset[str]:
    """Give every encoded layer its weight; tied layers share one. Return the names."""
    held: dict[str, Weight] = {}
    for module in model.modules():
        if isinstance(module, EncodedLinear | EncodedLoraLinear | EncodedEmbedding):
            name = str(module.encoded_name)
            held.setdefault(name, weight(name))
            module.weight = held[name]
    return frozenset(held)
