"""Grids of the engines whose server runs in this process: worker processes of this machine, or Ray actors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fedlp.apps.batching import cohort_size, sends_stacks
from fedlp.apps.client_app import MAKER, AppOf, LocalFederation
from fedlp.apps.packed_federation import find_obstacle, pack
from fedlp.config import RunConfig, to_yaml
from fedlp.data.examples import DataInfo
from fedlp.errors import ConfigError
from fedlp.federation.server.roster import Profiles
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.federation.submodels import SubModels
from fedlp.simulation.local import LocalGrid
from fedlp.simulation.parcel import HandOver
from fedlp.simulation.streamed_grid import StreamedGrid


class GridFederation(LocalFederation, Protocol):
    """Federation that a grid serves."""

    submodels: SubModels
    info: DataInfo

    @property
    def keeps_states(self) -> bool:
        """Whether clients keep files from one message to the next."""

    def message_bytes(self) -> int:
        """Return an upper bound of the bytes of one message's arrays."""


def open_grid(federation: GridFederation, out: Path) -> StreamedGrid:
    """Return the grid of the config's engine, a context manager.

    Parameters
    ----------
    out : Path
        The run directory.

    Raises
    ------
    FedLPError
        If its workers cannot start.
    """
    config = federation.config
    if config.simulation.engine == "ray":
        return _on_ray(federation, out)
    app = AppOf(federation)
    return LocalGrid(
        app,
        num_clients=config.num_clients,
        num_workers=app.count_workers(config.simulation, config.clients_per_round),
        message_bytes=_message_bytes(federation),
        run_config=_run_config(config, out),
        cohort=cohort_size(config, federation.submodels, federation.info),
        stacks=sends_stacks(config),
        start=config.simulation.start,
        profiles=_profiles_of(federation, out),
    )


def _on_ray(federation: GridFederation, out: Path) -> StreamedGrid:
    from fedlp.simulation.ray_cluster import RaySettings
    from fedlp.simulation.ray_grid import RayGrid

    config, simulation = federation.config, federation.config.simulation
    if (why := find_obstacle(federation)) is not None:
        raise ConfigError(f"simulation=ray: {why}")
    about, arrays = pack(federation)
    for kind, name, path in about["own"]:
        if path.startswith("__main__:"):
            raise ConfigError(f"simulation=ray: {kind} {name} is defined in the main script; put it into a module")
    gpus = simulation.gpus_per_client
    per_actor = float(config.device == "cuda") if gpus is None else gpus
    return RayGrid(
        HandOver(MAKER, {**about, "logs": False}, arrays),  # an actor's log goes to the server
        RaySettings(simulation.address, simulation.workers, per_actor, simulation.object_store_bytes),
        num_clients=config.num_clients,
        most_workers=config.clients_per_round,
        message_bytes=_message_bytes(federation),
        run_config=_run_config(config, out),
        state_dir=out if federation.keeps_states else None,
        profiles=_profiles_of(federation, out),
    )


def _message_bytes(federation: GridFederation) -> int:
    return federation.message_bytes() + 4096 * len(federation.submodels.spec.tensors)


def _profiles_of(federation: GridFederation, out: Path) -> Callable[[], Profiles]:
    """Return the maker of the profiles that the clients of a run would send, from the data of this process."""

    def profiles() -> Profiles:
        runtime = federation.runtime(str(RunDirectory(out).clients))
        return {client_id + 1: runtime.profile(client_id) for client_id in range(federation.config.num_clients)}

    return profiles


def _run_config(config: RunConfig, out: Path) -> dict[str, bool | float | int | str]:
    return {"cfg": to_yaml(config), "out": str(out)}
