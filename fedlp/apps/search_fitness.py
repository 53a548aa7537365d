"""Fitness of candidates on this machine's data: measured in worker processes, and cached on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlp.allocation.search.evolution import Plan
from fedlp.apps.fitness_log import FitnessLog
from fedlp.pruning.precomputed_models import PrecomputedModel
from fedlp.simulation.forked_calls import ForkedCalls


class Fitness:
    """Mean over ratios of the divergence from the dense model, relative to uniform sparsity's.

    Values of a stopped search are read from ``search.jsonl``.
    """

    def __init__(
        self, precomputed: PrecomputedModel, uniform: Sequence[Plan], num_partial: int, file: Path, workers: int
    ) -> None:
        self._num_partial, self._log = num_partial, FitnessLog(file)
        precomputed.settle()

        def measure(task: Any) -> float:
            plan, num_batches = task
            return precomputed.divergence(plan, num_batches)

        self._calls = ForkedCalls(measure, workers)
        self._base = {full: self._divergences([uniform], full)[0] for full in (False, True)}

    def close(self) -> None:
        """End the worker processes."""
        self._calls.__exit__()

    def __call__(self, candidates: Sequence[Sequence[Plan]], full: bool) -> list[float]:
        """Return the fitness of each candidate's plans."""
        found = self._divergences(candidates, full)
        return [float(np.mean(np.divide(values, self._base[full]))) for values in found]

    def _divergences(self, candidates: Sequence[Sequence[Plan]], full: bool) -> list[list[float]]:
        known = self._log.known
        keys = [[_key(plan, full) for plan in plans] for plans in candidates]
        missing = {
            key: plan
            for plans, names in zip(candidates, keys, strict=True)
            for plan, key in zip(plans, names, strict=True)
            if key not in known
        }
        tasks = [
            ({name: int(kept) for name, kept in plan.items()}, None if full else self._num_partial)
            for plan in missing.values()
        ]
        self._log.add(dict(zip(missing, self._calls.map(tasks), strict=True)))
        return [[known[key] for key in names] for names in keys]


def _key(plan: Plan, full: bool) -> str:
    return f"{'all' if full else 'part'} " + " ".join(str(plan[name]) for name in sorted(plan))
