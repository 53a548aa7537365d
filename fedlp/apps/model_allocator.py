"""Allocation on one model with central data: evidence measured on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fedlp import registry
from fedlp.allocation.budget.solve import Cost, allocate_shape
from fedlp.allocation.evidence import ByLayer, Evidence
from fedlp.allocation.layer_metrics import LayerStatistics, Leaf, compute_statistics
from fedlp.allocation.rules.dp import allocate_by_curves
from fedlp.pruning.layer_statistics import Collector
from fedlp.pruning.precomputed_models import PrecomputedModel
from fedlp.pruning.pruner import Pruner
from fedlp.pruning.reader_layers import Reader
from fedlp.pruning.scores.criterion import saliencies
from fedlp.pruning.scores.flap import Flap
from fedlp.pruning.tracing.decoder import is_language_model
from fedlp.types import PrunableLayer


def rule_names() -> tuple[str, ...]:
    """Return the allocation rules without a file."""
    return tuple(name for name in registry.names("allocator") if name != "plan")


class Allocator:
    """Allocation of the units of one model.

    Parameters
    ----------
    pruner : Pruner
        Supplier of statistics of the dense model; its model is consumed on first use.
    cost : callable
        Cost of a choice of units kept.
    """

    def __init__(self, pruner: Pruner, cost: Cost) -> None:
        self.layers: Sequence[PrunableLayer] = pruner.layers
        self.units = {layer.name: layer.num_units for layer in pruner.layers}
        self._pruner, self._cost = pruner, cost
        self._whole = cost(self.units)
        self._prunable = self._whole - cost(dict.fromkeys(self.units, 0))

    def limit(self, sparsity: float) -> float:
        """Return the remaining cost at a mean sparsity of the prunable units."""
        return self._whole - sparsity * self._prunable

    def allocate(self, rule: Any, limit: float) -> dict[str, int]:
        """Return the units kept of each layer by a part of kind ``allocator``."""
        sparsity = min((self._whole - limit) / self._prunable, 1.0)
        return rule(self.layers, self.evidence.at(sparsity), self._cost, limit)  # type: ignore[no-any-return]

    def by_rule(self, name: str, limit: float) -> dict[str, int]:
        """Return the units kept of each layer by a built-in rule with its default options."""
        return self.allocate(registry.lookup("allocator", name)(), limit)

    def by_shape(self, shape: Mapping[str, float], amplitude: float, limit: float) -> dict[str, int]:
        """Return the units kept of each layer for a shape over layers: the higher, the more is removed."""
        return allocate_shape(self.layers, shape, amplitude, self._cost, limit)

    # ------------------------------------------------------------------------------------------------------ statistics
    @cached_property
    def evidence(self) -> Evidence:
        """Measurements for rules."""
        return Evidence(
            self.layers,
            0.5,
            weights=self._weights,
            input_norms=lambda: self._diagonals[0],
            unit_scores=lambda: self._diagonals[1],
            error_curves=lambda: self._curves,
            model=lambda: self._statistics,
        )

    @cached_property
    def precomputed(self) -> PrecomputedModel:
        """The dense model with the statistics and the order of removal of every layer."""
        return PrecomputedModel(self._pruner, self._pruner.data.batches[:1])

    @cached_property
    def _diagonals(self) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """Mean squares of the readers' inputs and fluctuations of units, by layer; no layer's readers are kept."""
        squares, fluctuations, score = dict[str, list[Any]](), dict[str, Any](), Flap()
        for layer, readers in self._read():
            squares[layer.name] = [reader.statistics.square_mean.cpu().numpy() for reader in readers]
            fluctuations[layer.name] = saliencies(score, self._pruner.view(layer, readers, score)).numpy()
        return squares, fluctuations

    def _read(self) -> Iterator[tuple[PrunableLayer, Sequence[Reader]]]:
        """Yield each layer with its readers, and the means and mean squares of their inputs."""
        if "precomputed" in self.__dict__:
            yield from ((layer, self.precomputed.readers[layer.name]) for layer in self.layers)
            return
        pruner = self._pruner
        collector = Collector(
            pruner.model, None, self.layers, pruner.data.batches, pruner.norms, diagonal=True, pauses=True
        )
        yield from ((layer, collector.collect(layer)) for layer in self.layers)
        collector.close()

    def _weights(self) -> Mapping[str, Any]:
        layers = {layer.name: layer for layer in self.layers}
        return ByLayer(list(layers), lambda name: self._weights_of(layers[name]))

    def _weights_of(self, layer: PrunableLayer) -> list[Any]:
        if "precomputed" in self.__dict__:  # whose modules have taken on other weights
            return [reader.shaped_weight().cpu().numpy() for reader in self.precomputed.readers[layer.name]]
        return [reader.shaped_weight().cpu().numpy() for reader in self._pruner.readers(layer)]

    def _predicted_losses(self) -> dict[str, tuple[float, ...]]:
        """Return the losses that eliminations predict, layer by layer; nothing else of a layer is kept."""
        collector, found = self._pruner.collector(None), dict[str, tuple[float, ...]]()
        for layer in self.layers:
            most = layer.num_units - layer.least
            found[layer.name] = self._pruner.removal_order(layer, collector.collect(layer), most).losses
        collector.close()
        return found

    @cached_property
    def _statistics(self) -> tuple[LayerStatistics, ...]:
        losses, evidence = self.precomputed.losses, self.evidence
        elements: dict[str, dict[Leaf, Any]] = {
            name: {
                "magnitude": np.concatenate([np.abs(weight).ravel() for weight in weights]),
                "wanda": evidence.wanda[name],
                "saliency": np.diff(losses[name], prepend=0.0).clip(min=0.0),
            }
            for name, weights in evidence.weights.items()
        }
        return compute_statistics(self.layers, elements, self._sensitivities(), self.half_by_curves)

    def _sensitivities(self) -> dict[str, float]:
        """Return the divergence caused by halving one layer alone."""
        halves = {layer.name: -(-layer.num_units // 2) for layer in self.layers}
        found = self.measure([{**self.units, name: half} for name, half in halves.items()])
        return dict(zip(halves, found, strict=True))

    def measure(self, plans: Sequence[Mapping[str, int]]) -> Sequence[float]:
        """Return the divergence of each plan from the dense model."""
        return [self.precomputed.divergence(plan) for plan in plans]

    def measured_curves(self) -> Mapping[str, Sequence[float]]:
        """Return each layer's measured divergence over units removed."""
        return self.precomputed.on(self._pruner.data.batches).divergence_curves()

    @cached_property
    def half_by_curves(self) -> dict[str, float]:
        """Sparsities of the rule "dp" at a mean sparsity of one half."""
        kept = allocate_by_curves(self.layers, self._curves, self._cost, self.limit(0.5))
        return {name: 1.0 - kept[name] / count for name, count in self.units.items()}

    @cached_property
    def _curves(self) -> Mapping[str, Sequence[float]]:
        """Each layer's loss over units removed: predicted for language models, measured for classifiers."""
        if is_language_model(self._pruner.model):
            return self.precomputed.losses if "precomputed" in self.__dict__ else self._predicted_losses()
        return self.measured_curves()
