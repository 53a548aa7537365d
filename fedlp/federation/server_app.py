"""The server: a Flower app around a function that serves one run, and the settings both apps are given."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlp.config import compose, to_yaml
from fedlp.errors import FedLPError
from fedlp.federation.checkpoint import write_atomically

__all__ = ["Grid", "make_server_app", "read_outcome", "read_settings"]


def make_server_app(serve: Callable[[Grid, str, Path], object]) -> ServerApp:
    """Return the Flower app; ``serve`` is given the grid, the config (YAML) and the run directory."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        outcome: dict[str, str] = {}
        try:
            serve(grid, *read_settings(context))
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


def read_outcome(path: Path) -> None:
    """Raise what ended a run of the ServerApp, from the file that its run config named as ``outcome``.

    Raises
    ------
    FedLPError
        With the reason that the run ended for.
    RuntimeError
        With the traceback of any other error.
    """
    outcome: dict[str, str] = json.loads(path.read_text())
    if "reason" in outcome:
        raise FedLPError(outcome["reason"])
    if "traceback" in outcome:
        raise RuntimeError(f"the ServerApp failed on Flower:\n{outcome['traceback']}")


def read_settings(context: Context) -> tuple[str, Path]:
    """Return the config (YAML) and the run directory from a Flower run config.

    ``cfg`` holds a whole composed config; where it is empty, ``overrides`` (separated by blanks) are composed with the
    config tree, as on the command line. ``out`` is where the server writes.
    """
    settings = context.run_config
    cfg = str(settings.get("cfg", "")) or to_yaml(compose(str(settings.get("overrides", "")).split()))
    return cfg, Path(str(settings.get("out", "")) or f"runs/flower-{context.run_id}").absolute()
