r"""Adapters of several clients on one linear layer: :math:`y_k = W x_k + s B_k A_k x_k` for all clients k at once.

Inputs hold the examples of all clients, (clients * n, ..., in), those of a client one after another. The layer's
weight multiplies all of them as one matrix; A and B are batched products, added in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.models.dropout import drop_stack

Pair = tuple[Tensor, Tensor]
"""A and B of several clients, (clients, r, in) and (clients, out, r)."""

_stacks: dict[nn.Module, Pair] = {}  # of the pass under way


@contextmanager
def stacked_adapters(stacks: Mapping[nn.Module, Pair]) -> Iterator[None]:
    """Let adapted layers apply adapters of several clients within a context, each to its client's examples."""
    _stacks.update(stacks)
    try:
        yield
    finally:
        _stacks.clear()


def stack_of(layer: nn.Module) -> Pair | None:
    """Return the adapters that a layer applies in the pass under way; None where it applies its own."""
    return _stacks.get(layer)


def apply_stack(layer: nn.Linear, inputs: Tensor, pair: Pair, scale: float, dropout: float) -> Tensor:
    """Return the outputs of a linear layer with the adapters of several clients, (clients * n, ..., out).

    Parameters
    ----------
    scale : float
        s.
    dropout : float
        Probability that an adapter's input is zero, in [0, 1).
    """
    a, b = pair[0], scale * pair[1]
    flat = inputs.reshape(len(b), -1, inputs.shape[-1])
    if not dropout:
        found: Tensor = _Adapted.apply(flat, layer.weight, layer.bias, a, b)  # type: ignore[no-untyped-call]
    else:
        stack = inputs.reshape(len(b), len(inputs) // len(b), *inputs.shape[1:])
        dropped = drop_stack(stack, dropout).reshape(flat.shape)
        found = torch.baddbmm(F.linear(flat, layer.weight, layer.bias), dropped.bmm(a.mT), b.mT)
    return found.reshape(*inputs.shape[:-1], found.shape[-1])


class _Adapted(torch.autograd.Function):
    """Linear layer with adapters as one operator, whose layer is frozen."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """Return the outputs (clients, n, out) of inputs (clients, n, in)."""
        low = inputs.bmm(a.mT)
        ctx.save_for_backward(inputs, weight, a, b, low)
        return F.linear(inputs, weight, bias).baddbmm_(low, b.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None]:
        """Return the gradients of inputs, A and B."""
        inputs, weight, a, b, low = ctx.saved_tensors
        needs = ctx.needs_input_grad
        before = gradient.bmm(b) if needs[0] or needs[3] else None
        moved = (gradient @ weight).baddbmm_(before, a) if needs[0] else None
        return (
            moved,
            None,
            None,
            before.mT.bmm(inputs) if needs[3] and before is not None else None,
            gradient.mT.bmm(low) if needs[4] else None,
        )
