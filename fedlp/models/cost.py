"""Compute cost of a model's forward pass and training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fedlp.models.forward import forward_logits, run_copy

NORM_MACS = 4  # per element: subtract, divide, multiply, add
_FLOPS_PER_MAC = 2


@dataclass(frozen=True, slots=True)
class Macs:
    """Multiply-accumulates per example; ``training`` is forward and backward together."""

    forward: float
    training: float


def count_macs(model: nn.Module, inputs: Tensor) -> Macs:
    """Return the multiply-accumulates of one example, forward and backward in training mode, by operator.

    Counted are matrix products and convolutions (their biases are free) and, at 4 per element, batch, group and layer
    normalisation: the convention of thop, in which FedLP's CNN has 39.36 M. The passes run on shapes alone, those of
    small models and of models with value-dependent operators on a copy. Frozen parameters have no gradient and cost
    none.

    Parameters
    ----------
    model : nn.Module
        Any model for :func:`~fedlp.models.forward.forward_logits`; not modified.
    inputs : (batch, ...)
        Model inputs; only shape and dtype matter. The count does not depend on the batch.
    """
    example = inputs[:1].expand(2, *inputs.shape[1:])  # batch statistics need two
    return run_copy(model, example, _count)


def _count(model: nn.Module, batch: Tensor) -> Macs:
    with _Counter() as counter:
        logits = forward_logits(model.train(), batch)
        forward = counter.flops
        if logits.requires_grad:
            logits.sum().backward()  # type: ignore[no-untyped-call]
    per_example = _FLOPS_PER_MAC * len(batch)
    return Macs(forward / per_example, counter.flops / per_example)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count of floating-point operations within a context, by the formulas of torch's FlopCounterMode and ours.

    torch's own imports torch's compiler with the first operator, which takes a second.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self._formulas = FlopCounterMode(display=False, custom_mapping=_formulas()).flop_registry

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return whether the compiler, once imported, leaves this mode out."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return the result of an operator, and count it."""
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return NotImplemented
        if func._overloadpacket not in self._formulas and func.namespace != "prim":
            with self:
                if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return parts
        result = func(*args, **kwargs)
        if (formula := self._formulas.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def count_module_macs(model: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Return the multiply-accumulates per example that a forward pass spends within each module, by path.

    The convention and the parameters are those of :func:`count_macs`.
    """
    example = inputs[:1].expand(2, *inputs.shape[1:])
    return run_copy(model, example, _count_within)


@torch.no_grad()
def _count_within(model: nn.Module, batch: Tensor) -> dict[str, float]:
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        forward_logits(model.train(), batch)
    root, per_example = f"{type(model).__name__}.", _FLOPS_PER_MAC * len(batch)
    return {
        name.removeprefix(root): sum(each.values()) / per_example for name, each in counter.get_flop_counts().items()
    }


def _formulas() -> dict[Any, Callable[..., int]]:
    aten = torch.ops.aten
    norms = (
        aten.native_batch_norm,
        aten._native_batch_norm_legit,  # what it decomposes into on shapes
        aten.native_batch_norm_backward,
        aten.native_group_norm,
        aten.native_group_norm_backward,
        aten.native_layer_norm,
        aten.native_layer_norm_backward,
    )
    return {
        **dict.fromkeys(norms, _norm_flops),
        aten.convolution_backward: _convolution_backward_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,  # torch counts those of GPUs alone
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Return the FLOPs of both products, over all places whether masked or not."""
    return _FLOPS_PER_MAC * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward_flops(
    _: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__: Any, **___: Any
) -> int:
    """Return twice those of the forward pass; what is computed again does not count."""
    return 2 * _attention_flops(query, key, value)


def _convolution_backward_flops(
    grad_out: torch.Size, inputs: torch.Size, weight: torch.Size, *more: Any, **_: Any
) -> int:
    """Return as many FLOPs per required gradient as forward; torch's own count ignores groups."""
    transposed, output_mask = more[4], more[7]
    places = inputs[2:] if transposed else grad_out[2:]
    products: int = inputs[0] * math.prod(weight) * math.prod(places)
    return _FLOPS_PER_MAC * products * int(sum(output_mask[:2]))  # of inputs and weights; the bias is free


def _norm_flops(shape: torch.Size, *_: Any, **__: Any) -> int:
    return _FLOPS_PER_MAC * NORM_MACS * torch.Size(shape).numel()
