"""Dense model that takes the widths of any plan, from each layer's order of removal and its refit: no moments, no data.

It is the :class:`~fedlp.pruning.precomputed_models.PrecomputedModel` whose ``refits`` it is given, to rounding: so what
one process has measured, others can judge on data of their own.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.pruning.kernels.removal_factor import refit_ordered, unpack_factor
from fedlp.pruning.layer_statistics import make_readers
from fedlp.pruning.pruner import predictions
from fedlp.pruning.reader_layers import Method, Reader
from fedlp.pruning.tracing.units import kept_columns, weight_matrix
from fedlp.types import PrunableLayer

MOST_DIVERGENCE = 1e4
"""Nats per label that a divergence counts at most, infinite ones too: of models that are ruined, one is as bad."""

_HELD_BYTES = 1 << 28  # of the dense model's predictions, and of refitted weights

_Parts = list[tuple[Tensor, Tensor]]


def refit_signature(
    model: nn.Module, layers: Sequence[PrunableLayer], dtype: torch.dtype
) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Return name, shape and dtype of each tensor of refits, in order."""
    found: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for layer in layers:
        found.append((f"{layer.name}.order", (layer.num_units,), torch.int32))
        for path in layer.readers:
            size = weight_matrix(model.get_submodule(path)).shape[1]
            found += [(f"{path}.mean", (size,), dtype), (f"{path}.factor", (size * (size - 1) // 2,), dtype)]
    return found


class RefittedModel:
    """Dense model whose layers take on refitted weights of any width.

    Parameters
    ----------
    model : nn.Module
        Dense, in evaluation mode; changed.
    norms : mapping from path to path
        The batch norms that follow readers.
    method : Method
        That of the refits.
    refits : mapping
        Tensors of :func:`refit_signature`.

    Raises
    ------
    ValueError
        If an order of removal is no permutation, or a tensor is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[PrunableLayer],
        norms: Mapping[str, str],
        method: Method,
        refits: Mapping[str, Tensor],
    ) -> None:
        self.model, self._layers, self._method, self._refits = model, layers, method, refits
        for name, tensor in refits.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} is not finite")
        for layer in layers:
            order = refits[f"{layer.name}.order"]
            if not torch.equal(order.sort().values, torch.arange(layer.num_units, dtype=order.dtype)):
                raise ValueError(f"{layer.name}.order is no permutation of {layer.num_units} units")
        self._readers = {layer.name: make_readers(model, layer, norms, False) for layer in layers}
        self._kept = dict.fromkeys(self._readers, 0)  # what is measured does not depend on what was before
        self._parts: OrderedDict[tuple[str, int], _Parts] = OrderedDict()
        self._num_bytes = 0

    @torch.no_grad()
    def divergences(self, batches: Sequence[Tensor], plans: Sequence[Mapping[str, int]]) -> Tensor:
        """Return the sum over labels of each plan's KL divergence from the dense model, in nats, (plans,), float64.

        Parameters
        ----------
        plans : sequence of mappings from layer name to int
            Units that stay.
        """
        totals = torch.zeros(len(plans), dtype=torch.float64)
        held: list[tuple[Tensor, Tensor]] = []
        for number, batch in enumerate(batches):
            self._take_on({layer.name: layer.num_units for layer in self._layers})
            held.append((batch, predictions(self.model, [batch])[0]))
            if number == len(batches) - 1 or sum(dense.nbytes for _, dense in held) >= _HELD_BYTES:
                totals += self._compare(held, plans)
                held = []
        return totals

    def _compare(self, held: Sequence[tuple[Tensor, Tensor]], plans: Sequence[Mapping[str, int]]) -> Tensor:
        totals = torch.zeros(len(plans), dtype=torch.float64)
        for number, plan in enumerate(plans):
            self._take_on(plan)
            for batch, dense in held:
                pruned = predictions(self.model, [batch])[0]
                value = float(F.kl_div(pruned, dense, log_target=True, reduction="sum"))
                most = MOST_DIVERGENCE * len(dense)
                totals[number] += min(max(value, 0.0), most) if math.isfinite(value) else most
        return totals

    def _take_on(self, plan: Mapping[str, int]) -> None:
        for layer in self._layers:
            kept = plan[layer.name]
            if self._kept[layer.name] != kept:
                for reader, part in zip(self._readers[layer.name], self._part(layer, kept), strict=True):
                    reader.write(*part, self._method)
                self._kept[layer.name] = kept

    def _part(self, layer: PrunableLayer, kept: int) -> _Parts:
        """Return the refitted weights and biases of a layer's readers; those used last are remembered."""
        key = layer.name, kept
        if key not in self._parts:
            self._parts[key] = [self._refit(layer, reader, kept) for reader in self._readers[layer.name]]
            self._num_bytes += _num_bytes(self._parts[key])
        self._parts.move_to_end(key)
        while self._num_bytes > _HELD_BYTES and len(self._parts) > 1:
            self._num_bytes -= _num_bytes(self._parts.popitem(last=False)[1])
        return self._parts[key]

    def _refit(self, layer: PrunableLayer, reader: Reader, kept: int) -> tuple[Tensor, Tensor]:
        dense, device = reader.weight, reader.weight.device
        units = self._refits[f"{layer.name}.order"].to(device, torch.int64)
        columns, removed = kept_columns(units, reader.unit_size), (layer.num_units - kept) * reader.unit_size
        factor = unpack_factor(self._refits[f"{reader.path}.factor"].to(device), len(columns))
        weight = torch.zeros_like(dense)
        weight[:, columns[removed:]] = refit_ordered(dense[:, columns], factor, removed)
        mean = self._refits[f"{reader.path}.mean"].to(device, torch.float64)
        return weight.float(), (reader.bias + (dense - weight) @ mean).float()


def _num_bytes(parts: _Parts) -> int:
    return sum(tensor.nbytes for part in parts for tensor in part)
