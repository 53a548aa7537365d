"""The server: a Flower app around a function that serves one run, and the settings both apps are given."""

from __future__ import annotations

import json
import shlex
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedlp.config import compose, compose_federated_search, from_yaml, to_yaml
from fedlp.config.resuming import resumed_config
from fedlp.errors import ConfigError, FedLPError
from fedlp.federation.flower_compat import is_simulated
from fedlp.federation.server.checkpoint import write_atomically
from fedlp.simulation.carried_config import CarryingGrid, read_carried

__all__ = ["Grid", "make_server_app", "read_settings", "settings_of"]


def make_server_app(serve: Callable[[Grid, str, Path], object]) -> ServerApp:
    """Return the Flower app; ``serve`` is given the grid, the config (YAML) and the run directory."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        outcome: dict[str, str] = {}
        try:
            cfg, out = read_settings(context)
            check_size(grid, from_yaml(cfg).num_clients)
            carries = not context.run_config.get("cfg") and from_yaml(cfg).resume
            serve(CarryingGrid(grid, cfg) if carries else grid, cfg, out)
        except FedLPError as error:
            outcome = {"reason": str(error)}
            raise
        except Exception:
            outcome = {"traceback": traceback.format_exc()}
            raise
        finally:
            if path := context.run_config.get("outcome"):
                write_atomically(Path(str(path)), json.dumps(outcome).encode())

    return app


def check_size(grid: Grid, num_clients: int, patience_s: float = 10.0) -> None:
    """Raise ConfigError if Flower simulates fewer SuperNodes than the run has clients; nobody else would ever join.

    Parameters
    ----------
    patience_s : float
        Time for the simulated nodes to appear, in seconds.
    """
    deadline = time.monotonic() + patience_s
    while is_simulated(grid) and (count := len(list(grid.get_node_ids()))) < num_clients:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"Flower simulates {count} SuperNodes, but the run has num_clients={num_clients}; "
                f"add --federation-config num-supernodes={num_clients} to flwr run, lower num_clients, "
                "or use fedlp simulation=flower"
            )
        time.sleep(0.1)


def read_settings(context: Context) -> tuple[str, Path]:
    """Return the config (YAML) and the run directory from a Flower run config.

    ``cfg`` holds a whole composed config; where it is empty, ``overrides``, quoted as in a shell, are composed with the
    config tree, as on the command line of ``fedlp``, or of ``fedlp-search`` where that is their first word. ``out`` is
    where the server writes; a run that goes on (``resume=``) stays where it is.

    Raises
    ------
    ConfigError
        As on the command line.
    """
    settings = {key: str(context.run_config.get(key, "")) for key in ("cfg", "overrides", "out")}
    out = Path(settings["out"] or f"runs/flower-{context.run_id}").absolute()
    if settings["cfg"]:
        return settings["cfg"], out
    overrides = _split(settings["overrides"])
    if overrides[:1] == ["fedlp-search"]:
        return to_yaml(compose_federated_search(overrides[1:])), out
    config = compose(overrides)
    if config.resume is not None:
        folder = Path(config.resume).absolute()
        if settings["out"] and out.resolve() != folder.resolve():
            overrides.append(f"out={out}")
        config, out = resumed_config(replace(config, resume=str(folder)), overrides), folder
    return to_yaml(config), out


def _split(overrides: str) -> list[str]:
    """Return the words of a line of overrides."""
    try:
        return shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(f"overrides={overrides} cannot be split into words: {error}") from error


def settings_of(message: Message, context: Context) -> tuple[str, Path]:
    """Return the config (YAML) and the run directory of a message that carries them, else of the run config."""
    return read_carried(message.content) or read_settings(context)
