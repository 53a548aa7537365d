"""Fitness of candidates on clients' data: a plan is a byte per layer down, and a number up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedlp.allocation.search.evolution import Plan
from fedlp.apps.fitness_log import FitnessLog
from fedlp.errors import CalibrationError
from fedlp.federation.oneshot.client_judge import ClientJudge
from fedlp.federation.oneshot.plans import encode_plans
from fedlp.federation.oneshot.settings import Share
from fedlp.types import PrunableLayer

_MOST_PLANS = 512  # in one message, but for those of uniform sparsity


class ClientFitness:
    """Mean over ratios of the divergence from the dense model, relative to uniform sparsity's on the same clients.

    The uniform plans are in every message: where a client drops out, both are measured on the others. Values of a
    stopped search are read from ``search.jsonl``.

    Parameters
    ----------
    uniform : sequence of plans
        At each ratio.
    told : callable
        Called with the best fitness on all fitness examples so far, whenever there are new ones.
    """

    def __init__(
        self,
        judge: ClientJudge,
        layers: Sequence[PrunableLayer],
        uniform: Sequence[Plan],
        file: Path,
        told: Callable[[float], None],
    ) -> None:
        self._judge, self._layers, self._uniform, self._told = judge, layers, list(uniform), told
        self._log = FitnessLog(file)
        self._best = float("inf")

    def __call__(self, candidates: Sequence[Sequence[Plan]], full: bool) -> list[float]:
        """Return the fitness of each candidate's plans."""
        share, known = Share.FITNESS if full else Share.PART, self._log.known
        keys = [[self._key(plan, ratio, share) for ratio, plan in enumerate(plans)] for plans in candidates]
        missing = {
            key: (plan, ratio)
            for plans, names in zip(candidates, keys, strict=True)
            for ratio, (plan, key) in enumerate(zip(plans, names, strict=True))
            if key not in known
        }
        self._measure(missing, share)
        found = [float(np.mean([known[key] for key in names])) for names in keys]
        if full:
            self._best = min(self._best, *found)
            self._told(self._best)
        return found

    def _measure(self, missing: Mapping[str, tuple[Plan, int]], share: Share) -> None:
        """Put the relative divergences of plans at a ratio on record."""
        for start in range(0, len(missing), _MOST_PLANS):
            keys = list(missing)[start : start + _MOST_PLANS]
            asked = [*self._uniform, *(missing[key][0] for key in keys)]
            values = self._judge.divergences(asked, share)
            base, found = values[: len(self._uniform)], values[len(self._uniform) :]
            if min(base) <= 0:
                raise CalibrationError(
                    "uniform sparsity changes nothing on the clients' fitness examples; raise search.fitness_examples "
                    "or search.ratios"
                )
            self._log.add({key: value / base[missing[key][1]] for key, value in zip(keys, found, strict=True)})

    def _key(self, plan: Plan, ratio: int, share: Share) -> str:
        levels = encode_plans([plan], self._layers)
        return f"{share.name.lower()} {ratio} {' '.join(map(str, levels))}"
