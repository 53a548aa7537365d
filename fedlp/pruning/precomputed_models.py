"""Divergence of a model pruned to any widths, at the cost of a forward pass: every layer is pruned beforehand.

Each layer's order of removal and its statistics come from the dense model once. A choice of widths is then put together
from the layers' refitted weights, which are kept for the next choice. Layers do not see each other's errors here, as
they do in :meth:`~fedlp.pruning.pruner.Pruner.prune`: this ranks choices, it does not replace pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedlp.pruning.kernels.removal_factor import removal_factor
from fedlp.pruning.pruner import Pruner, mean_divergence, predictions
from fedlp.pruning.reader_layers import Reader
from fedlp.pruning.tracing.units import kept_columns
from fedlp.types import PrunableLayer

_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_STEPS = 32  # widths per layer that are told apart: the rest are rounded to them

Measure = Callable[[Sequence[Mapping[str, int]]], Sequence[float]]
"""Returns the divergence of each of some choices of widths."""


def width_level(layer: PrunableLayer, kept: int) -> int:
    """Return the number of the width that a number of kept units is rounded to, in [0, 64]."""
    return round(kept / _step(layer))


def width_of_level(layer: PrunableLayer, level: int) -> int:
    """Return the kept units of a level: at least 1, and at most all."""
    return min(max(1, level * _step(layer)), layer.num_units)


def _step(layer: PrunableLayer) -> int:
    return max(1, layer.num_units // _STEPS)


def divergence_curves(layers: Sequence[PrunableLayer], measure: Measure) -> dict[str, list[float]]:
    """Return each layer's divergence over units removed, that layer alone pruned.

    A few points are measured and the rest interpolated. For models whose errors are too large for the losses that the
    elimination predicts.
    """
    units = {layer.name: layer.num_units for layer in layers}
    points: dict[str, list[int]] = {}
    for layer in layers:
        counts = points[layer.name] = [0]
        for level in _LEVELS:
            counts.append(max(counts[-1] + (level < 1), round(level * (layer.num_units - 1))))
        if not layer.least:
            points[layer.name] = [*(count for count in counts if count < layer.num_units), layer.num_units]
    removals = [(layer, count) for layer in layers for count in points[layer.name][1:]]
    measured = iter(measure([{**units, layer.name: layer.num_units - count} for layer, count in removals]))
    found = {}
    for layer in layers:
        values = [0.0]
        for _ in points[layer.name][1:]:
            values.append(max(values[-1], next(measured)))
        removed = np.arange(1, layer.num_units - layer.least + 1)
        found[layer.name] = np.interp(removed, points[layer.name], values).tolist()
    return found


class PrecomputedModel:
    """Dense model that can take any widths, from individually pruned layers.

    Parameters
    ----------
    pruner : Pruner
        Its model is taken over and changed; its score must give losses (OBS).
    batches : sequence of Tensor
        Inputs on which divergences are measured.
    """

    def __init__(self, pruner: Pruner, batches: Sequence[Tensor]) -> None:
        self.layers = pruner.layers
        self.losses: dict[str, tuple[float, ...]] = {}
        self._method, self._model, self._batches = pruner.method, pruner.model, list(batches)
        collector = pruner.collector(None)
        self.readers: dict[str, list[Reader]] = {}
        self._orders: dict[str, Tensor] = {}
        self._parts: dict[tuple[str, int], list[tuple[Tensor, Tensor | None]]] = {}
        for layer in self.layers:
            self.readers[layer.name] = collector.collect(layer)
            found = pruner.removal_order(layer, self.readers[layer.name], layer.num_units - layer.least)
            self._orders[layer.name] = torch.tensor(found.order)
            self.losses[layer.name] = found.losses
        collector.close()
        self._kept: dict[str, int] = {}
        self._dense = predictions(self._model, self._batches)

    def divergence(self, kept: Mapping[str, int], num_batches: int | None = None) -> float:
        """Return the mean KL divergence from the dense model, in nats per label, on the first ``num_batches``.

        Parameters
        ----------
        kept : mapping from layer name to int
            Units that stay; rounded to one of 32 widths per layer, 0 aside.
        """
        for layer in self.layers:
            width = width_of_level(layer, width_level(layer, kept[layer.name]))
            self._take_on(layer, width if kept[layer.name] or layer.least else 0)
        batches = self._batches[:num_batches]
        return mean_divergence(self._dense[:num_batches], predictions(self._model, batches))

    def divergence_curves(self) -> dict[str, list[float]]:
        """Return the measured :func:`divergence_curves`."""
        return divergence_curves(self.layers, lambda plans: [self.divergence(plan) for plan in plans])

    def refits(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors of which :class:`~fedlp.pruning.refitted_model.RefittedModel` makes the same models."""
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            order = self._orders[layer.name]
            rest = torch.arange(layer.num_units)
            order = torch.cat([order, rest[~torch.isin(rest, order)]])
            found[f"{layer.name}.order"] = order.to(torch.int32)
            for reader in self.readers[layer.name]:
                inverse = reader.solve(self._method)[1]
                columns = kept_columns(order.to(inverse.device), reader.unit_size)
                found[f"{reader.path}.mean"] = reader.moments.mean.to(dtype)
                found[f"{reader.path}.factor"] = removal_factor(inverse, columns).to(dtype)
        return found

    def settle(self) -> None:
        """Write every layer's weights: a divergence is the same to the last bit then, whatever was measured before."""
        for layer in self.layers:
            self._kept[layer.name] = 0
            self._take_on(layer, layer.num_units)

    def on(self, batches: Sequence[Tensor]) -> PrecomputedModel:
        """Measure on other batches from now on."""
        for layer in self.layers:
            self._take_on(layer, layer.num_units)
        self._batches = list(batches)
        self._dense = predictions(self._model, self._batches)
        return self

    def _take_on(self, layer: PrunableLayer, kept: int) -> None:
        if self._kept.get(layer.name, layer.num_units) == kept:
            return
        key = layer.name, kept
        if key not in self._parts:
            everything = torch.arange(layer.num_units)
            gone = torch.isin(everything, self._orders[layer.name][: layer.num_units - kept])
            parts = [
                reader.solution(everything[~gone], everything[gone], self._method) for reader in self.readers[key[0]]
            ]
            self._parts[key] = [(weight.float(), None if bias is None else bias.float()) for weight, bias in parts]
        for reader, (weight, bias) in zip(self.readers[layer.name], self._parts[key], strict=True):
            reader.write(weight, bias, self._method)
        self._kept[layer.name] = kept
