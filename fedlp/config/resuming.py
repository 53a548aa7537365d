"""Config of a resumed run: its stored config, except its length and engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fedlp.config import RunConfig, read_run_config, validate
from fedlp.errors import ConfigError

_RESUMABLE_WITH = ("num_rounds", "simulation", "resume")


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
