"""Compute cost of a model's forward pass and training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
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
    normalisation: the convention of thop, in which FedLP's CNN has 39.36 M. The passes run on shapes alone, so counting
    takes negligible time; a model with value-dependent operators runs on a copy. Frozen parameters have no
    gradient and cost none.

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
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        logits = forward_logits(model.train(), batch)
        forward = counter.get_total_flops()
        if logits.requires_grad:
            logits.sum().backward()  # type: ignore[no-untyped-call]
        total = counter.get_total_flops()
    per_example = _FLOPS_PER_MAC * len(batch)
    return Macs(forward / per_example, total / per_example)


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
        aten._native_batch_norm_legit,  # what native_batch_norm decomposes into
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
