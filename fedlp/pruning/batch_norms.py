"""Batch norms of a pruned model: which of them follow layers, and their re-estimated statistics."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from fedlp.pruning.tracing.decoder import is_language_model

_BatchNorm = nn.modules.batchnorm._BatchNorm


def reestimate_batch_norms(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Set the running statistics of all batch norms to the averages over these batches, in place."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def following_batch_norms(model: nn.Module, batch: Tensor) -> dict[str, str]:
    """Return the batch norm that reads the outputs of a convolution or linear layer, by the path of the latter."""
    if is_language_model(model):
        return {}
    written: dict[int, str] = {}
    found: dict[str, str] = {}
    outputs = []  # kept alive, so that their ids stay theirs
    with ExitStack() as stack:
        for path, module in model.named_modules():

            def look(_: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
                found[written.get(id(inputs[0]), "")] = path

            def note(_: nn.Module, __: object, output: Tensor, path: str = path) -> None:
                outputs.append(output)
                written[id(output)] = path

            if isinstance(module, _BatchNorm):
                stack.callback(module.register_forward_pre_hook(look).remove)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                stack.callback(module.register_forward_hook(note).remove)
        model(batch[:1])
    return found
