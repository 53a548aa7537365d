"""ClientApp of a federation on the local engine: inherited by forked workers, built again by spawned ones."""

from __future__ import annotations

import logging
from typing import Any, Protocol

from fedlp.apps.packed_federation import Source, find_obstacle, pack
from fedlp.config import SimulationConfig
from fedlp.errors import ConfigError
from fedlp.federation.client.app import make_client_app
from fedlp.federation.client.runtime import ClientRuntime
from fedlp.simulation.flower_apps import settings_of
from fedlp.simulation.named import missing_script
from fedlp.simulation.parcel import HandOver
from fedlp.simulation.starting import start_method
from fedlp.training.threads import count_cores

log = logging.getLogger("fedlp")

MAKER = "fedlp.apps.rebuild:rebuild_app"


class LocalFederation(Source, Protocol):
    """Federation that runs with its server in this process."""

    def runtime(self, state_dir: str) -> ClientRuntime:
        """Return the runtime of a client process."""


class AppOf:
    """Maker of the ClientApp of a federation."""

    def __init__(self, federation: LocalFederation) -> None:
        self._federation = federation

    def __call__(self) -> Any:
        """Return the app, a Flower ClientApp."""
        return make_client_app(lambda cfg, state_dir, own=None: self._federation.runtime(state_dir), settings_of)

    def hand_over(self) -> HandOver:
        """Return the recipe of the same ClientApp for another process."""
        about, arrays = pack(self._federation)
        return HandOver(MAKER, about, arrays)

    def count_workers(self, simulation: SimulationConfig, clients_per_round: int) -> int:
        """Return the number of worker processes; 0 if the clients train in this process.

        That is chosen where workers must be spawned and could not build an equal federation.

        Raises
        ------
        ConfigError
            If they could not, and the config asks for spawned workers and their number.
        """
        asked = count_cores() if simulation.workers is None else simulation.workers
        asked = min(asked, clients_per_round)
        if asked == 0 or start_method(simulation.start) == "fork":
            return asked
        script = missing_script()
        why = f"the main script {script} is no file" if script else find_obstacle(self._federation)
        if why is None:
            return asked
        if simulation.start == "spawn" and simulation.workers is not None:
            raise ConfigError(f"simulation.start=spawn: {why}; or set simulation.workers=0: clients in this process")
        log.warning("clients train one after another in this process (simulation.workers=0): %s", why)
        return 0
