"""Composition root of ``fedlp-search``: search for an allocation function on one model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlp.allocation.search.evolution import Plan
from fedlp.apps import prune as oneshot
from fedlp.apps.model_allocator import Allocator
from fedlp.apps.search_fitness import Fitness
from fedlp.apps.search_modes import Modes, Plans, compare_held_out, write_search
from fedlp.config import PruneConfig, SearchConfig, to_yaml
from fedlp.errors import ConfigError
from fedlp.pruning.costs.footprint import Footprint
from fedlp.pruning.pruner import Calibration, Method, Pruner, mean_divergence, predictions
from fedlp.pruning.scores.obs import OBS
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
        modes = Modes(config.search, config.seed, allocator)
        report = _search(config, modes, allocator, scene, out / "search.jsonl")
        report["held_out"] = _check(config, scene, modes.finalists(report))
    report["winner"] = min(report["held_out"], key=lambda name: report["held_out"][name]["mean"])
    report["wall_time_s"] = time.monotonic() - started
    write_search(report, out, f"{config.model.options.get('path') or config.run}, seed {config.seed}")
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


def _search(config: SearchConfig, modes: Modes, allocator: Allocator, scene: _Scene, file: Path) -> dict[str, Any]:
    """Run every mode on the fitness examples; return their report."""
    settings = config.search
    partial = max(1, -(-settings.fitness_examples // settings.batch_size) // 4)
    precomputed = allocator.precomputed.on(scene.fitness)
    fitness = Fitness(precomputed, modes.rules["uniform"], partial, file, settings.workers or count_cores())
    try:
        return modes.run(fitness)
    finally:
        fitness.close()


def _check(config: SearchConfig, scene: _Scene, finalists: Mapping[str, Plans]) -> dict[str, dict[str, float]]:
    """Prune for real with each finalist; return held-out divergences."""
    subject, method = scene.subject, make_method(config.pruner)
    dense = predictions(subject.model, scene.held_out)

    def divergence(plan: Plan) -> float:
        pruner = Pruner(subject.model, subject.widths, subject.layers, scene.statistics, method)
        return mean_divergence(dense, predictions(pruner.prune(plan).model, scene.held_out))

    found = {name: [divergence(plan) for plan in by_ratio] for name, by_ratio in finalists.items()}
    return compare_held_out(found, config.search.ratios)
