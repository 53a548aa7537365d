"""Evidence of allocation rules in a round: the server's weights, and sums from clients.

Pooled input norms are those of all clients' inputs in one place: sums of squares add up, column by column, over the
clients that hold the column. Wanda's metric on the server is then exactly the central one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlp.allocation.evidence import Evidence
from fedlp.federation.strategies.policy import Answer, Memory
from fedlp.federation.submodels import SubModels
from fedlp.models import state_tensors
from fedlp.models.adapters import merge_adapters
from fedlp.pruning.tracing.units import weight_matrix
from fedlp.types import Keep, PrunableLayer

_NORM = "norm"


def round_evidence(
    submodels: SubModels,
    most: Mapping[str, int],
    sparsity: float,
    memory: Memory,
    params: Mapping[str, Tensor] | None,
) -> Evidence:
    """Return the evidence available in a round.

    Parameters
    ----------
    most : mapping from layer name to int
        Most units of each layer that may be kept, by score.
    sparsity : float
        Mean sparsity that corresponds to the limit, in [0, 1].
    params : mapping from tensor name to Tensor, or None
        Global values.
    """
    layers = submodels.layers
    held = [replace(x, num_units=most[x.name]) for x in layers]
    suppliers: dict[str, Callable[[], Any]] = {}
    if all(f"score.{x.name}" in memory for x in layers):
        best = {x.name: np.sort(memory[f"score.{x.name}"].numpy())[-x.num_units :] for x in held}
        suppliers["unit_scores"] = lambda: best
        suppliers["error_curves"] = lambda: {name: np.cumsum(found)[:-1].tolist() for name, found in best.items()}
    if params is not None:
        suppliers["weights"] = lambda: _weights(submodels, params)
    if all(f"{_NORM}.{path}" in memory for x in layers for path in x.readers):
        suppliers["input_norms"] = lambda: {
            x.name: [memory[f"{_NORM}.{path}"].numpy() for path in x.readers] for x in layers
        }
    return Evidence(held, sparsity, **suppliers)


def _weights(submodels: SubModels, params: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return the weights that read each layer, (out, in) or (out, in, height, width), float64."""
    model = submodels.skeleton()
    for name, tensor in state_tensors(model).items():
        tensor.copy_(params[name])
    merge_adapters(model)
    found: dict[str, list[Any]] = {}
    for layer in submodels.layers:
        found[layer.name] = []
        for path in layer.readers:
            module = model.get_submodule(path)
            matrix = weight_matrix(module).to(torch.float64)
            shaped = matrix.view(module.weight.shape) if isinstance(module, torch.nn.Conv2d) else matrix
            found[layer.name].append(shaped.numpy())
    return found


def pool_input_norms(layers: Sequence[PrunableLayer], memory: Memory, answers: Sequence[Answer]) -> dict[str, Tensor]:
    """Return the mean square of each column of each reader's inputs, over the clients that measured it in this round.

    A column without a measurement keeps its value, or has the mean of the others.
    """
    found: dict[str, Tensor] = {}
    for layer in layers:
        for path in layer.readers:
            answered = [(a, r.input_norms[path]) for a, r in answers if path in r.input_norms]
            if not answered:
                continue
            assigned, first = answered[0]
            held = assigned.submodel.widths.get(layer.name, Keep.full(layer.num_units))
            columns = len(first.total) // held.count * layer.num_units
            total, count = torch.zeros(columns, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64)
            for assigned, norms in answered:
                keep = assigned.submodel.widths.get(layer.name, Keep.full(layer.num_units))
                index = torch.from_numpy(keep.repeat(columns // layer.num_units).indices())
                total[index] += norms.total
                count[index] += norms.count
            mean = total / count.clamp(min=1.0)
            measured = count > 0
            old = memory.get(f"{_NORM}.{path}", mean[measured].mean().expand(columns))
            found[f"{_NORM}.{path}"] = torch.where(measured, mean, old)
    return found
