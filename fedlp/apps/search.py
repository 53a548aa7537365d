"""Composition root of ``fedlp-search``: search for an allocation function on one model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from fedlp.allocation.search.evolution import Settings, Space, Trial, VectorSpace, best_trial, search
from fedlp.allocation.search.expressions import Expression
from fedlp.allocation.search.tree_nodes import Scalar
from fedlp.apps import prune as oneshot
from fedlp.apps.model_allocator import Allocator, rule_names
from fedlp.apps.search_fitness import Fitness
from fedlp.apps.search_spaces import ChainSpace, FunctionSpace
from fedlp.config import PruneConfig, SearchConfig, to_yaml
from fedlp.errors import ConfigError
from fedlp.pruning.costs.footprint import Footprint
from fedlp.pruning.pruner import Calibration, Method, Pruner, mean_divergence, predictions
from fedlp.pruning.scores.obs import OBS
from fedlp.report.searching import draw_search
from fedlp.rng import Stream, generator
from fedlp.tasks import task_of
from fedlp.training.calibration_data import make_method
from fedlp.training.threads import count_cores, one_thread


@dataclass(frozen=True)
class _Scene:
    """Data of a search: for statistics, for fitness, and for the final check."""

    subject: oneshot.Subject
    statistics: Calibration
    fitness: Sequence[Tensor]
    held_out: Sequence[Tensor]


def run_search(config: SearchConfig, out: Path) -> dict[str, Any]:
    """Search, write ``search.json``, ``winner.yaml`` and ``search.png`` to ``out``, and return the report."""
    if (out / "search.json").exists():
        raise ConfigError(f"hydra.run.dir={out} already holds a finished search; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    text = to_yaml(config)
    if (out / "config.yaml").exists() and (out / "config.yaml").read_text(encoding="utf-8") != text:
        raise ConfigError(f"hydra.run.dir={out} holds a search of another config; choose another folder")
    (out / "config.yaml").write_text(text, encoding="utf-8")
    started = time.monotonic()
    with one_thread():
        scene = _set_scene(config)
        method = Method(OBS(), fisher=True, damping=config.pruner.damping, keeps_batch_norm=True)
        subject = scene.subject
        pruner = Pruner(subject.model, subject.widths, subject.layers, scene.statistics, method)
        allocator = Allocator(pruner, Footprint(subject.model, subject.widths).count)
        report = _search_modes(config, out, allocator, scene)
        report["held_out"] = _check(config, scene, allocator, report)
    report["winner"] = min(report["held_out"], key=lambda name: report["held_out"][name]["mean"])
    report["wall_time_s"] = time.monotonic() - started
    _write(report, out, config)
    return report


def _set_scene(config: SearchConfig) -> _Scene:
    """Load model and data, and divide calibration examples into three."""
    settings = config.search
    wanted = config.calibration.examples + settings.fitness_examples + settings.held_out_examples
    prune_config = PruneConfig(
        seed=config.seed,
        sparsity=0.5,
        run=config.run,
        device="cpu",
        model=config.model,
        dataset=config.dataset,
        task=config.task,
        pruner=config.pruner,
    )
    prune_config.calibration.examples, prune_config.calibration.batch_size = wanted, settings.batch_size
    subject = oneshot.load_subject(prune_config)
    task_of(subject.info).require_softmax("fedlp-search", subject.info)
    drawn = oneshot.draw_calibration(prune_config, subject)
    first, second = (
        -(-count // settings.batch_size) for count in (config.calibration.examples, settings.fitness_examples)
    )
    statistics = Calibration(drawn.batches[:first], drawn.labels[:first], drawn.seed)
    return _Scene(subject, statistics, drawn.batches[first : first + second], drawn.batches[first + second :])


def _search_modes(config: SearchConfig, out: Path, allocator: Allocator, scene: _Scene) -> dict[str, Any]:
    """Run every mode at equal evaluations; return their traces and the fitness of the hand rules."""
    settings, ratios = config.search, config.search.ratios
    limits = [allocator.limit(ratio) for ratio in ratios]
    rules = {name: [allocator.by_rule(name, limit) for limit in limits] for name in rule_names()}
    space: Space[Any] = FunctionSpace(allocator, ratios) if settings.space == "trees" else ChainSpace(allocator, ratios)
    partial = max(1, -(-settings.fitness_examples // settings.batch_size) // 4)
    fitness = Fitness(
        allocator.precomputed.on(scene.fitness),
        rules["uniform"],
        partial,
        out / "search.jsonl",
        settings.workers or count_cores(),
    )
    started, done = time.monotonic(), 0
    report: dict[str, Any] = {"ratios": list(ratios), "modes": {}}
    try:
        report["hand_rules"] = dict(zip(rules, fitness(list(rules.values()), True), strict=True))
        best_rule = min(report["hand_rules"], key=lambda name: report["hand_rules"][name])
        start = {name: 1.0 - kept / allocator.units[name] for name, kept in rules[best_rule][len(ratios) // 2].items()}
        for index, mode in enumerate(settings.modes):
            rng = generator(config.seed, Stream.SEARCH, index)
            how = Settings(settings.evaluations, settings.population, evolves=mode != "random")
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

            if mode == "vector":
                vectors = VectorSpace(start, lambda z: [allocator.by_shape(z, 1.0, limit) for limit in limits])
                trials: list[Trial[Any]] = search(vectors, fitness, how, rng, observe, [tuple(start.values())])
            else:
                first = [_first_function(allocator)] if settings.space == "trees" else []
                trials = search(space, fitness, how, rng, observe, first)
            report["modes"][mode] = _summary(trials, allocator.units)
    finally:
        fitness.close()
    report["search_s"] = time.monotonic() - started
    return report


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


def _check(
    config: SearchConfig, scene: _Scene, allocator: Allocator, report: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Prune for real with the best of each mode, the best hand rule and uniform; return held-out divergences."""
    ratios = config.search.ratios
    hand = min(report["hand_rules"], key=lambda name: report["hand_rules"][name])
    plans = {
        name: [allocator.by_rule(name, allocator.limit(ratio)) for ratio in ratios]
        for name in dict.fromkeys(("uniform", hand))
    }
    plans |= {mode: found["plans"] for mode, found in report["modes"].items()}
    subject, method = scene.subject, make_method(config.pruner)
    dense = predictions(subject.model, scene.held_out)
    found: dict[str, dict[str, float]] = {}
    for name, by_ratio in plans.items():
        values = {}
        for ratio, plan in zip(ratios, by_ratio, strict=True):
            pruner = Pruner(subject.model, subject.widths, subject.layers, scene.statistics, method)
            model = pruner.prune(plan).model
            values[f"{ratio:g}"] = mean_divergence(dense, predictions(model, scene.held_out))
        found[name] = values
    for values in found.values():
        values["mean"] = float(np.mean([values[f"{r:g}"] / found["uniform"][f"{r:g}"] for r in ratios]))
    return found


def _write(report: Mapping[str, Any], out: Path, config: SearchConfig) -> None:
    """Write the winner as a file that ``allocator=dsa allocator.path=`` takes, the report and the plot."""
    winner = report["winner"]
    lines = [f"# Found by fedlp-search on {config.model.options.get('path') or config.run}, seed {config.seed}."]
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
