"""Jobs of a sweep: objective and direction, and jobs that are finished or stopped already."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlp.config import RunConfig, read_run_config, to_plain
from fedlp.errors import ConfigError
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.tasks.direction import larger_is_better

_FREE = ("resume", "simulation")  # options in which a run that goes on may differ


def objective_of(config: RunConfig, manifest: Mapping[str, Any]) -> float | None:
    """Return the objective reported to the sweeper; None if the run has no finite value of it."""
    final = manifest["final_metrics"]
    names = [config.objective] if config.objective else sorted(final, key=lambda name: name == "train_loss")
    value = final.get(names[0]) if names else None
    return float(value) if value is not None and math.isfinite(value) else None


def direction_of(objective: str) -> str:
    """Return the direction in which a sweeper optimises a metric; ConfigError if there is none of this name."""
    return "maximize" if larger_is_better(objective) else "minimize"


def earlier_run(config: RunConfig, out: Path) -> tuple[RunConfig, dict[str, Any] | None]:
    """Return the config of a sweep's resumed job, and the manifest if its run is finished.

    Raises
    ------
    ConfigError
        If the folder holds a run of another config; names the options in which they differ.
    """
    if not (out / "config.yaml").is_file():
        return config, None
    directory = RunDirectory(out)
    finished = (out / "manifest.json").is_file()
    if not finished and not directory.has_checkpoints():
        return config, None  # it reached none: from the start
    stored = read_run_config(out / "config.yaml")
    free = _FREE if stored.trains else (*_FREE, "num_rounds")  # pruning has a round for each layer
    if differing := _differing(to_plain(stored), to_plain(config), free):
        raise ConfigError(f"{out} holds a run with another {' and '.join(differing)}; choose another hydra.sweep.dir")
    if finished:
        manifest = directory.read_manifest()
        if manifest["totals"].get("good_rounds") == 0 and stored.trains:
            raise ConfigError(f"{out} holds a run that trained nothing; delete it to try again")
        return config, manifest
    return replace(config, resume=str(out)), None


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], free: Sequence[str]) -> list[str]:
    """Return the names of the options in which two configs differ, without free ones."""
    names = []
    for key in (key for key in one if key not in free and one[key] != other.get(key)):
        if isinstance(one[key], dict) and isinstance(other.get(key), dict):
            names += [f"{key}.{name}" for name, value in one[key].items() if value != other[key].get(name)] or [key]
        else:
            names.append(key)
    return names
