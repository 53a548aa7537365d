"""The server: a Flower app around a function that serves one run, and the settings both apps are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlp.config import compose, to_yaml

__all__ = ["Grid", "make_server_app", "read_settings"]


def make_server_app(serve: Callable[[Grid, str, Path], object]) -> ServerApp:
    """Return the Flower app; ``serve`` is given the grid, the config (YAML) and the run directory."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, *read_settings(context))

    return app


def read_settings(context: Context) -> tuple[str, Path]:
    """Return the config (YAML) and the run directory from a Flower run config.

    ``cfg`` holds a whole composed config; where it is empty, ``overrides`` (separated by blanks) are composed with the
    config tree, as on the command line. ``out`` is where the server writes.
    """
    settings = context.run_config
    cfg = str(settings.get("cfg", "")) or to_yaml(compose(str(settings.get("overrides", "")).split()))
    return cfg, Path(str(settings.get("out", "")) or f"runs/flower-{context.run_id}").absolute()
