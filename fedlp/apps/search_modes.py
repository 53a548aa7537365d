"""Modes of a search at equal evaluations, whoever measures the candidates; and the files of its result."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedlp.allocation.search.evolution import Fitness, Plan, Settings, Space, Trial, VectorSpace, best_trial, search
from fedlp.allocation.search.expressions import Expression
from fedlp.allocation.search.tree_nodes import Scalar
from fedlp.apps.model_allocator import Allocator, rule_names
from fedlp.apps.search_spaces import ChainSpace, FunctionSpace
from fedlp.config import SearchSettings
from fedlp.rng import Stream, generator

Plans = Sequence[Plan]
"""The plan at each ratio."""


class Modes:
    """Search of every mode, and hand rules beside it.

    Parameters
    ----------
    allocator : Allocator
        Its evidence is measured here, before any candidate is.
    """

    def __init__(self, settings: SearchSettings, seed: int, allocator: Allocator) -> None:
        self._settings, self._seed, self._allocator = settings, seed, allocator
        self._limits = [allocator.limit(ratio) for ratio in settings.ratios]
        self.rules = {name: [allocator.by_rule(name, limit) for limit in self._limits] for name in rule_names()}
        of_trees = settings.space == "trees"
        ratios = settings.ratios
        self._space: Space[Any] = FunctionSpace(allocator, ratios) if of_trees else ChainSpace(allocator, ratios)
        self._first = [_first_function(allocator)] if of_trees else []

    def run(self, fitness: Fitness) -> dict[str, Any]:
        """Return the traces of all modes, and the fitness of the hand rules."""
        started, done = time.monotonic(), 0
        report: dict[str, Any] = {"ratios": list(self._settings.ratios), "modes": {}}
        report["hand_rules"] = dict(zip(self.rules, fitness(list(self.rules.values()), True), strict=True))
        for index, mode in enumerate(self._settings.modes):
            best = float("inf")

            def observe(trial: Trial[Any], mode: str = mode) -> None:
                nonlocal done, best
                done += 1
                if trial.full < best:
                    best = trial.full
                    seconds = time.monotonic() - started
                    print(
                        f"{mode} {done}: {best:.4f} of uniform's divergence, {seconds:.0f}s: {trial.text}", flush=True
                    )

            rng = generator(self._seed, Stream.SEARCH, index)
            how = Settings(self._settings.evaluations, self._settings.population, evolves=mode != "random")
            if mode == "vector":
                space, first = self._vectors(report["hand_rules"])
            else:
                space, first = self._space, self._first
            report["modes"][mode] = _summary(search(space, fitness, how, rng, observe, first), self._allocator.units)
        report["search_s"] = time.monotonic() - started
        return report

    def _vectors(self, hand_rules: Mapping[str, float]) -> tuple[Space[Any], list[Any]]:
        """Return the space of sparsities around those of the best hand rule, and its first candidate."""
        allocator, middle = self._allocator, len(self._limits) // 2
        plan = self.rules[best_rule(hand_rules)][middle]
        start = {name: 1.0 - kept / allocator.units[name] for name, kept in plan.items()}
        space = VectorSpace(start, lambda z: [allocator.by_shape(z, 1.0, limit) for limit in self._limits])
        return space, [tuple(start.values())]

    def finalists(self, report: Mapping[str, Any]) -> dict[str, Plans]:
        """Return the plans of the best of each mode, of the best hand rule and of uniform, for a held-out check."""
        hand = best_rule(report["hand_rules"])
        plans: dict[str, Plans] = {name: self.rules[name] for name in dict.fromkeys(("uniform", hand))}
        return plans | {mode: found["plans"] for mode, found in report["modes"].items()}


def best_rule(hand_rules: Mapping[str, float]) -> str:
    """Return the hand rule of the least fitness."""
    return min(hand_rules, key=lambda name: hand_rules[name])


def compare_held_out(
    divergences: Mapping[str, Sequence[float]], ratios: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Return each finalist's divergence at each ratio, and their mean relative to uniform's."""
    uniform = divergences["uniform"]
    found = {}
    for name, values in divergences.items():
        by_ratio = {f"{ratio:g}": value for ratio, value in zip(ratios, values, strict=True)}
        found[name] = by_ratio | {"mean": float(np.mean([x / y for x, y in zip(values, uniform, strict=True)]))}
    return found


def _first_function(allocator: Allocator) -> Expression:
    """Return the function closest to the rule "dp"."""
    values = allocator.half_by_curves.values()
    return Expression(Scalar("curve"), amplitude=max(2.0 * (max(values) - min(values)), 0.01), power=1.0)


def _summary(trials: Sequence[Trial[Any]], units: Mapping[str, int]) -> dict[str, Any]:
    """Return the best trial of a mode and the trace of the best fitness."""
    best = best_trial(trials)
    values = np.array([trial.full for trial in trials])
    trace = np.fmin.accumulate(np.where(np.isnan(values), np.inf, values))
    found: dict[str, Any] = {"fitness": best.full, "text": best.text, "plans": [dict(plan) for plan in best.plans]}
    if isinstance(best.candidate, Expression):
        found |= best.candidate.to_config()
    middle = best.plans[len(best.plans) // 2]
    found["sparsity"] = {name: 1.0 - kept / units[name] for name, kept in middle.items()}
    return found | {"evaluations": len(trials), "best_so_far": [None if np.isinf(x) else float(x) for x in trace]}


def write_search(report: Mapping[str, Any], out: Path, source: str) -> None:
    """Write the winner as a file that ``allocator=dsa allocator.path=`` takes, the plot, and last the report.

    Parameters
    ----------
    source : str
        Model and seed, for a comment.
    """
    from fedlp.report.searching import draw_search  # matplotlib takes a second to load: not in every run

    winner = report["winner"]
    lines = [f"# Found by fedlp-search on {source}."]
    functions = {name: mode for name, mode in report["modes"].items() if "function" in mode}
    if winner in functions:
        values = {key: functions[winner][key] for key in ("function", "amplitude", "power")}
    elif winner in report["modes"]:
        lines.append("# No function, but sparsities of this model's own: use it as allocator=plan.")
        values = report["modes"][winner]["sparsity"]
    else:
        lines.append("# No function that was searched beat this hand rule on held-out data.")
        values = {"rule": winner}
    text = "\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False)
    (out / "winner.yaml").write_text(text, encoding="utf-8")
    (out / "search.png").write_bytes(draw_search(report))
    (out / "search.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
