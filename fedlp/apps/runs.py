"""Runs of a config: on the local engine, under Flower, or dry; and the two Flower apps that every engine runs.

``flwr run .`` finds ``server_app`` and ``client_app`` here through ``pyproject.toml``. Their run config holds the whole
composed config as one YAML string (``cfg``), or Hydra overrides (``overrides``), and the output folder (``out``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlp.apps.evaluation_check import refuse_simulation
from fedlp.apps.federate import Federation
from fedlp.apps.federated_prune import FederatedPruning
from fedlp.apps.federated_search import FederatedSearching
from fedlp.apps.privacy_ledger import expected_privacy
from fedlp.apps.resumption import load_state
from fedlp.apps.round_keeping import check_trained
from fedlp.config import FederatedPruneConfig, FederatedSearchConfig, RunConfig, from_yaml, to_plain, to_yaml
from fedlp.data.device_data import OwnPlace
from fedlp.data.examples import FederatedData
from fedlp.data.partition_plot import plot_partition
from fedlp.errors import ConfigError
from fedlp.federation.client.app import make_client_app
from fedlp.federation.client.runtime import ClientRuntime
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.federation.server.strategy import Observer
from fedlp.progress import Progress
from fedlp.simulation.flower_apps import Grid, make_server_app, settings_of
from fedlp.simulation.flower_run import run_on_flower
from fedlp.simulation.starting import refuse_unguarded
from fedlp.training.threads import count_cores


def federation_of(
    config: RunConfig, data: FederatedData | None = None, parts: Sequence[NDArray[np.int64]] | None = None
) -> Federation:
    """Return the federation of a config: one that trains, prunes in one shot, or searches; see :class:`Federation`."""
    kinds: dict[type, type[Federation]] = {
        FederatedPruneConfig: FederatedPruning,
        FederatedSearchConfig: FederatedSearching,
    }
    return kinds.get(type(config), Federation)(config, data=data, parts=parts)


class Holder:
    """Owner of an app process's federation; a new config replaces the last one."""

    def __init__(self) -> None:
        self._held: tuple[str, Federation] | None = None

    def of(self, cfg: str) -> Federation:
        """Return the federation of a config (YAML)."""
        if self._held is None or self._held[0] != cfg:
            self._held = None  # frees the last one's data first
            self._held = (cfg, federation_of(from_yaml(cfg)))
        return self._held[1]


_APP = Holder()


def make_plan(cfg: str) -> Federation:
    """Return the federation of a config (YAML) for this process's apps."""
    return _APP.of(cfg)


def make_runtime(cfg: str, state_dir: str, own: OwnPlace | None = None) -> ClientRuntime:
    """Return the client runtime of this process's apps."""
    return _APP.of(cfg).runtime(state_dir, own)


def serve_run(grid: Grid, cfg: str, out: Path, observers: Iterable[Observer] = ()) -> dict[str, Any]:
    """Run a federated run on a grid, from its start or from its last checkpoint; return the manifest."""
    return _APP.of(cfg).serve(grid, out, observers)


def run_locally(cfg: str, out: Path, observers: Iterable[Observer] = ()) -> dict[str, Any]:
    """Run a config (YAML) on the local engine; return the manifest."""
    return federation_of(from_yaml(cfg)).run_locally(out, observers)


def run(cfg: str | RunConfig, out: Path, label: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Run on the config's engine with live progress; return the manifest.

    Parameters
    ----------
    cfg : str or RunConfig
        YAML, or the validated config.
    label : callable
        Returns the name of a run from its plain config.
    """
    refuse_unguarded()
    config = from_yaml(cfg) if isinstance(cfg, str) else cfg
    refuse_simulation(config)
    if config.simulation.address is None:  # else devices are those of the nodes
        _check_device(config.device)
    directory = RunDirectory(out)
    state = None
    if config.resume:
        with directory.claim():
            state = load_state(directory, config)
    else:
        directory.refuse_if_used()
    done = 0 if state is None else state.server_round
    federation = federation_of(config)
    _plot_partition(federation, out)
    progress = Progress(federation.config.num_rounds, label(to_plain(config)), done)
    if config.simulation.engine == "flower":
        federation.say_whole_parts()  # the server's process has a log of its own
        workers = config.simulation.workers or count_cores()
        run_on_flower(to_yaml(config), out, config.num_clients, workers, progress.show, seen=done)
        progress.close()
        manifest = directory.read_manifest()
        check_trained(manifest, out)
        return manifest
    manifest = federation.run_locally(out, [lambda record, _: progress.show(asdict(record))])
    progress.close()
    return manifest


def _plot_partition(federation: Federation, out: Path) -> None:
    """Draw the partition if the config asks for it."""
    if federation.config.plot_partition:
        plot_partition(federation.parts, federation.data.train.targets, out / "partition.png")


def _check_device(name: str) -> None:
    """Raise ConfigError if this machine has no such device; CUDA is not initialised, as a fork would not survive it."""
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"device={name}: this machine has {count} CUDA devices that this PyTorch can use; set device=cpu"
        )


def dry_run(cfg: str, out: Path) -> dict[str, Any]:
    """Write and return a manifest with expected costs, without loading data or training."""
    plan = federation_of(from_yaml(cfg))
    expected = {**plan.expected(), **expected_privacy(plan.config)}
    per_round = plan.config.clients_per_round
    totals = {
        "rounds": plan.config.num_rounds,
        "bytes_down": expected["bytes_down_per_client"] * per_round * plan.config.num_rounds,
        "bytes_up": expected["bytes_up_per_client"] * per_round * plan.config.num_rounds,
    }
    if plan.info.num_train is not None:
        examples = plan.info.num_train / plan.config.num_clients * per_round * plan.config.local.epochs
        totals["macs"] = expected["training_macs_per_example"] * examples * plan.config.num_rounds
    directory = RunDirectory(out)
    directory.refuse_if_used()
    _plot_partition(plan, out)
    plan.say_whole_parts()
    return directory.write_manifest(to_plain(plan.config), expected, expected_totals=totals)


server_app = make_server_app(serve_run)
client_app = make_client_app(make_runtime, settings_of)
