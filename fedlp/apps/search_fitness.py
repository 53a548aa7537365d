"""Fitness of candidates: measured in worker processes, and cached on disk."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fedlp.allocation.search.evolution import Plan
from fedlp.errors import ConfigError, one_line
from fedlp.pruning.precomputed_models import PrecomputedModel

_MODEL: PrecomputedModel | None = None  # what worker processes inherit


class Fitness:
    """Mean over ratios of the divergence from the dense model, relative to uniform sparsity's.

    Values of a stopped search are read from ``search.jsonl``.
    """

    def __init__(
        self, precomputed: PrecomputedModel, uniform: Sequence[Plan], num_partial: int, file: Path, workers: int
    ) -> None:
        global _MODEL
        _MODEL = precomputed
        self._num_partial, self._file = num_partial, file
        self._known: dict[str, float] = {}
        if file.exists():
            *whole, torn = file.read_text(encoding="utf-8").split("\n")  # what was being written when it stopped
            try:
                self._known = {entry["key"]: float(entry["fitness"]) for entry in map(json.loads, whole)}
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"{file} is damaged ({one_line(error)}); remove it to search anew") from error
            if torn:
                file.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        self._pool = multiprocessing.get_context("fork").Pool(workers, torch.set_num_threads, (1,))
        self._base = {full: self._divergences([uniform], full)[0] for full in (False, True)}

    def close(self) -> None:
        """End the worker processes."""
        self._pool.terminate()
        self._pool.join()

    def __call__(self, candidates: Sequence[Sequence[Plan]], full: bool) -> list[float]:
        """Return the fitness of each candidate's plans."""
        found = self._divergences(candidates, full)
        return [float(np.mean(np.divide(values, self._base[full]))) for values in found]

    def _divergences(self, candidates: Sequence[Sequence[Plan]], full: bool) -> list[list[float]]:
        keys = [[_key(plan, full) for plan in plans] for plans in candidates]
        missing = {
            key: plan
            for plans, names in zip(candidates, keys, strict=True)
            for plan, key in zip(plans, names, strict=True)
            if key not in self._known
        }
        tasks = [(plan, None if full else self._num_partial) for plan in missing.values()]
        values = self._pool.starmap(_divergence, tasks, chunksize=1)
        with self._file.open("a", encoding="utf-8") as out:
            for key, value in zip(missing, values, strict=True):
                self._known[key] = value
                out.write(json.dumps({"key": key, "fitness": value}) + "\n")
        return [[self._known[key] for key in names] for names in keys]


def _key(plan: Plan, full: bool) -> str:
    return f"{'all' if full else 'part'} " + " ".join(str(plan[name]) for name in sorted(plan))


def _divergence(plan: Plan, num_batches: int | None) -> float:
    assert _MODEL is not None
    return _MODEL.divergence(plan, num_batches)
