"""Divergence of a model pruned to any widths, at the cost of a forward pass: every layer is pruned beforehand.

Each layer's order of removal and its statistics come from the dense model once. A choice of widths is then put together
from the layers' refitted weights, which are kept for the next choice. Layers do not see each other's errors here, as
they do in :meth:`~fedlp.pruning.pruner.Pruner.prune`: this ranks choices, it does not replace pruning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedlp.pruning.layer_statistics import Collector
from fedlp.pruning.pruner import Pruner, mean_divergence, predictions
from fedlp.pruning.reader_layers import Reader
from fedlp.types import PrunableLayer

_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_STEPS = 32  # widths per layer that are told apart: the rest are rounded to them


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
        batches, halves = pruner.data.batches, pruner.method.shrinks
        collector = Collector(pruner.model, None, pruner.layers, batches, pruner.norms, halves)
        self.readers: dict[str, list[Reader]] = {}
        self._orders: dict[str, Tensor] = {}
        self._parts: dict[tuple[str, int], list[tuple[Tensor, Tensor | None]]] = {}
        for layer in self.layers:
            self.readers[layer.name] = collector.collect(layer)
            found = pruner.removal_order(layer, self.readers[layer.name], layer.num_units - 1)
            self._orders[layer.name] = torch.tensor(found.order)
            self.losses[layer.name] = found.losses
        self._kept: dict[str, int] = {}
        self._dense = predictions(self._model, self._batches)

    def divergence(self, kept: Mapping[str, int], num_batches: int | None = None) -> float:
        """Return the mean KL divergence from the dense model, in nats per label, on the first ``num_batches``.

        Parameters
        ----------
        kept : mapping from layer name to int
            Units that stay; rounded to one of 32 widths per layer.
        """
        for layer in self.layers:
            self._take_on(layer, self._rounded(layer, kept[layer.name]))
        batches = self._batches[:num_batches]
        return mean_divergence(self._dense[:num_batches], predictions(self._model, batches))

    def divergence_curves(self) -> dict[str, list[float]]:
        """Return each layer's divergence over units removed, that layer alone pruned.

        A few points are measured and the rest interpolated. For models whose errors are too large for the losses that
        the elimination predicts.
        """
        units = {layer.name: layer.num_units for layer in self.layers}
        found = {}
        for layer in self.layers:
            counts, values = [0], [0.0]
            for level in _LEVELS:
                counts.append(max(counts[-1] + (level < 1), round(level * (layer.num_units - 1))))
                measured = self.divergence({**units, layer.name: layer.num_units - counts[-1]})
                values.append(max(values[-1], measured))
            found[layer.name] = np.interp(np.arange(1, layer.num_units), counts, values).tolist()
        return found

    def on(self, batches: Sequence[Tensor]) -> PrecomputedModel:
        """Measure on other batches from now on."""
        for layer in self.layers:
            self._take_on(layer, layer.num_units)
        self._batches = list(batches)
        self._dense = predictions(self._model, self._batches)
        return self

    def _rounded(self, layer: PrunableLayer, kept: int) -> int:
        step = max(1, layer.num_units // _STEPS)
        return min(max(1, round(kept / step) * step), layer.num_units)

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
