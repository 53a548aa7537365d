"""Absolute paths of the local files that a config names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fedlp.config.schema import RunConfig
from fedlp.config.tools import ProfileConfig, PruneConfig, SearchConfig

_Config = TypeVar("_Config", RunConfig, PruneConfig, ProfileConfig, SearchConfig)


def with_absolute_paths(config: _Config) -> _Config:
    """Return the config with absolute paths of its local files."""
    dataset, model = config.dataset, config.model
    paths = {key: dataset.options.get(key) for key in ("root", "path", "test_path", "tokenizer")}
    found = {key: value if value in ("bytes", "auto") else _absolute(value) for key, value in paths.items() if value}
    if paths["root"]:  # a folder that is downloaded to need not exist yet
        found["root"] = str(Path(paths["root"]).expanduser().absolute())
    server = None if dataset.server is None else _absolute(dataset.server)
    dataset = replace(dataset, options=dataset.options | found, server=server)
    if isinstance(path := model.options.get("path"), str):
        model = replace(model, options={**model.options, "path": _absolute(path)})
    found_config = replace(config, dataset=dataset, model=model)
    if isinstance(found_config, RunConfig) and isinstance(trace := found_config.fleet.availability, str):
        found_config.fleet = replace(found_config.fleet, availability=_absolute(trace))
    return found_config


def _absolute(name: str) -> str:
    """Return the absolute path of an existing file; any other name unchanged, since it may be a hub's."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name
