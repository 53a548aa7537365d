"""Configs that go back to a stored run: that of a resumed one, and that of a search on its model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from fedlp.config import FederatedSearchConfig, RunConfig, read_run_config, validate
from fedlp.errors import ConfigError

_RESUMABLE_WITH = ("num_rounds", "simulation", "resume")


_OF_RUN = ("model", "dataset", "task", "partition", "num_clients")


def searched_config(config: FederatedSearchConfig, overrides: Iterable[str]) -> FederatedSearchConfig:
    """Return the config of a federated search, with the model and the clients of the run that it names, if any.

    Parameters
    ----------
    overrides : iterable of str
        Overrides behind ``config``.

    Raises
    ------
    ConfigError
        If there is no such run, or an override changes what it brings.
    """
    if config.run is None:
        return config
    names = [override.lstrip("+~").split("=")[0] for override in overrides]
    if foreign := [name for name in names if name.split(".")[0] in _OF_RUN]:
        raise ConfigError(f"run={config.run} brings its own {', '.join(_OF_RUN)}: drop {', '.join(foreign)}")
    file = Path(config.run) / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"run={config.run}: that is not a run directory (it has no config.yaml)")
    stored = read_run_config(file)
    found = replace(config, run=str(file.parent.absolute()), **{name: getattr(stored, name) for name in _OF_RUN})
    validate(found)
    return found


def check_run(resume: str) -> Path:
    """Return a path as the folder of a run; ConfigError if it holds no run."""
    folder = Path(resume)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"resume={resume}: that is not a run directory (it has no config.yaml)")
    return folder


def resumed_config(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """Return the config of the run that ``config.resume`` names.

    Parameters
    ----------
    overrides : iterable of str
        Overrides behind ``config``; only length and engine apply to the resumed run.

    Raises
    ------
    ConfigError
        If there is no such run, or an override changes any other option.
    """
    assert config.resume is not None
    folder = check_run(config.resume)
    names = [override.lstrip("+~").split("=")[0] for override in overrides]
    foreign = [name for name in names if name.split(".")[0] not in _RESUMABLE_WITH]
    if foreign:
        raise ConfigError(f"resume goes on with the run's own config, in its own folder: drop {', '.join(foreign)}")
    stored = read_run_config(folder / "config.yaml")
    if isinstance(stored, FederatedSearchConfig):
        raise ConfigError(f"{folder} is a search: go on with its own command and hydra.run.dir={folder}")
    if not stored.trains:
        raise ConfigError(
            f"{folder} is a one-shot pruning, which cannot be resumed: start it anew in another hydra.run.dir"
        )
    stored.resume = str(folder)
    for name in names:
        if name == "num_rounds":
            stored.num_rounds = config.num_rounds
        elif name == "simulation":
            stored.simulation.engine = config.simulation.engine
        elif name != "resume":
            option = name.removeprefix("simulation.")
            setattr(stored.simulation, option, getattr(config.simulation, option))
    validate(stored)
    return stored
