"""Stored state of a pruned layer, from which a pruning that was stopped goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedlp.types import PrunableLayer

_KEEP, _LOSS, _RNG = "keep", "loss", "rng"


def layer_state(
    model: nn.Module,
    layer: PrunableLayer,
    norms: Mapping[str, str],
    keep: Tensor,
    loss: float,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """Return the state of a layer: tensors that pruning it changes, units kept, loss, state of the generator.

    Parameters
    ----------
    norms : mapping from str to str
        Path of the batch norm after a reader, by the reader's path.
    keep : (kept,)
        Sorted indices, int64.
    """
    extra = {_KEEP: keep, _LOSS: torch.tensor(loss, dtype=torch.float64), _RNG: rng.get_state()}
    return {**_tensors(model, layer, norms), **extra}


def restore_layer(
    model: nn.Module,
    layer: PrunableLayer,
    norms: Mapping[str, str],
    stored: Mapping[str, Tensor],
    rng: torch.Generator,
) -> tuple[Tensor, float]:
    """Write the stored state of a layer into the model and the generator; return the units kept and the loss."""
    for path in layer.readers:
        module: Any = model.get_submodule(path)
        if f"{path}.bias" in stored and getattr(module, "bias", None) is None:
            bias = stored[f"{path}.bias"].to(module.weight)
            module.bias = nn.Parameter(bias, requires_grad=module.weight.requires_grad)
    for name, tensor in _tensors(model, layer, norms).items():
        tensor.copy_(stored[name])
    rng.set_state(stored[_RNG])
    return stored[_KEEP], float(stored[_LOSS])


def _tensors(model: nn.Module, layer: PrunableLayer, norms: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the live tensors that pruning a layer changes."""
    found: dict[str, Tensor] = {}
    for path in layer.readers:
        module: Any = model.get_submodule(path)
        found[f"{path}.weight"] = module.weight.detach()
        if getattr(module, "bias", None) is not None:
            found[f"{path}.bias"] = module.bias.detach()
        if path in norms:
            found[f"{path}.mean"] = model.get_submodule(norms[path]).running_mean  # type: ignore[assignment]
    return found
