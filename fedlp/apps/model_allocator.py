"""Every rule of ``allocator=`` on one model, through the same budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedlp.allocation.budget.solve import Cost, round_units, solve_budget
from fedlp.allocation.layer_metrics import Leaf, compute_statistics, wanda_elements
from fedlp.allocation.rules import allocate
from fedlp.allocation.rules.hand_rules import HAND_RULES, Evidence, hand_rule
from fedlp.allocation.search.expressions import Expression, evaluate
from fedlp.errors import AllocationError, one_line
from fedlp.pruning.precomputed_models import Stitcher
from fedlp.pruning.pruner import Pruner
from fedlp.pruning.scores.criteria import flap_scores
from fedlp.pruning.tracing.decoder import is_language_model
from fedlp.types import PrunableLayer

DEPTH_RULES = ("uniform", "depth_line", "log_depth")
RULES = (*DEPTH_RULES, *HAND_RULES, "flap", "dp")


class Allocator:
    """Allocates the units of one model.

    Parameters
    ----------
    pruner : Pruner
        Gives statistics of the dense model, when a rule asks for them; its model is taken over then.
    cost : callable
        What a choice of units kept costs.
    """

    def __init__(self, pruner: Pruner, cost: Cost) -> None:
        self.layers: Sequence[PrunableLayer] = pruner.layers
        self.units = {layer.name: layer.num_units for layer in pruner.layers}
        self._pruner, self._cost = pruner, cost
        self._whole = cost(self.units)
        self._prunable = self._whole - cost(dict.fromkeys(self.units, 0))

    def limit(self, sparsity: float) -> float:
        """Return what may remain if this fraction of all that is prunable goes."""
        return self._whole - sparsity * self._prunable

    def by_rule(self, name: str, limit: float, amplitude: float | None = None) -> dict[str, int]:
        """Return the units kept of each layer by a rule of ``RULES``; ``amplitude`` only where it is not its own."""
        sparsity = min((self._whole - limit) / self._prunable, 1.0)
        if name == "dp":
            return allocate.allocate_by_curves(self.layers, self._curves, self._cost, limit)
        if name == "flap":
            return allocate.allocate_pooled(self.layers, self._fluctuations, self._cost, limit)
        if name in DEPTH_RULES:
            return allocate.allocate_by_depth(self.layers, name, sparsity, self._cost, limit, amplitude)
        shape, own = hand_rule(name, self.evidence, sparsity)
        return self.by_shape(shape, own if amplitude is None else amplitude, limit)

    def by_shape(self, shape: Mapping[str, float], amplitude: float, limit: float) -> dict[str, int]:
        """Return the units kept of each layer for a shape over layers: the higher, the more is removed."""
        solved = solve_budget(self.layers, shape, amplitude, self._cost, limit)
        return round_units(self.layers, solved, self._cost, limit)

    def by_file(self, path: str, limit: float) -> dict[str, int]:
        """Return the units kept of each layer as a file says that ``fedlp-search`` wrote."""
        stored = _read_mapping(path)
        if "function" in stored:
            function = Expression.from_config(stored)
            sparsity = min((self._whole - limit) / self._prunable, 1.0)
            return self.by_shape(evaluate(function, self.evidence.statistics), function.amplitude_at(sparsity), limit)
        if stored.get("rule") in RULES:
            return self.by_rule(str(stored["rule"]), limit)
        raise AllocationError(f"allocator.path={path} has neither a function nor a rule of {' '.join(RULES)}")

    def by_plan(self, path: str, limit: float) -> dict[str, int]:
        """Return the units kept of each layer if the sparsities of a file are shifted until the limit is met.

        Layers that the file leaves out come with a sparsity of 0.
        """
        stored = _read_mapping(path)
        for name, value in stored.items():
            if name not in self.units:
                raise AllocationError(f"allocator.path={path}: the model has no prunable layer {name}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise AllocationError(f"allocator.path={path}: layer {name} has sparsity {value}; it must be in [0, 1)")
        return self.by_shape({name: float(stored.get(name, 0.0)) for name in self.units}, 1.0, limit)

    # ------------------------------------------------------------------------------------------------------ statistics
    @cached_property
    def stitcher(self) -> Stitcher:
        """The dense model with all that is known of its layers."""
        return Stitcher(self._pruner, self._pruner.data.batches[:1])

    @cached_property
    def evidence(self) -> Evidence:
        """What rules and functions look at."""
        readers = self.stitcher.readers
        elements: dict[str, dict[Leaf, Any]] = {}
        for layer in self.layers:
            found = [
                (r.weight.cpu().numpy(), (r.moments.gram.diagonal() / r.moments.count).cpu().numpy())
                for r in readers[layer.name]
            ]
            elements[layer.name] = {
                "magnitude": np.concatenate([np.abs(weight).ravel() for weight, _ in found]),
                "wanda": np.concatenate([wanda_elements(weight, squares).ravel() for weight, squares in found]),
                "saliency": np.diff(self.stitcher.losses[layer.name], prepend=0.0).clip(min=0.0),
            }
        return Evidence(
            compute_statistics(self.layers, elements, self._sensitivities(), self.half_by_curves),
            {name: [reader.shaped_weight().cpu().numpy() for reader in found] for name, found in readers.items()},
            {name: leaves["wanda"] for name, leaves in elements.items()},
        )

    def _sensitivities(self) -> dict[str, float]:
        """Return the divergence that halving one layer alone causes."""
        halves = {layer.name: -(-layer.num_units // 2) for layer in self.layers}
        return {name: self.stitcher.divergence({**self.units, name: half}) for name, half in halves.items()}

    @cached_property
    def half_by_curves(self) -> dict[str, float]:
        """The sparsities of the rule "dp" when half of all goes."""
        kept = self.by_rule("dp", self.limit(0.5))
        return {name: 1.0 - kept[name] / count for name, count in self.units.items()}

    @cached_property
    def _curves(self) -> Mapping[str, Sequence[float]]:
        """Each layer's loss over units removed: predicted for language models, measured for classifiers."""
        if is_language_model(self._pruner.model):
            return self.stitcher.losses
        return self.stitcher.on(self._pruner.data.batches).divergence_curves()

    @property
    def _fluctuations(self) -> dict[str, Any]:
        readers = self.stitcher.readers
        return {
            name: sum(flap_scores(reader.weight, reader.moments, reader.unit_size).cpu().numpy() for reader in found)
            for name, found in readers.items()
        }


def _read_mapping(path: str) -> dict[str, Any]:
    try:
        stored = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AllocationError(f"allocator.path={path} cannot be read: {one_line(error)}") from error
    if not isinstance(stored, dict):
        raise AllocationError(f"allocator.path={path} does not map names to values")
    return stored
