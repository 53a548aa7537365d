"""Ray for one run: a private one on this machine, or a cluster that is joined."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from fedlp.errors import ConfigError, FedLPError, one_line

_LONGEST_FOLDER = 40  # Ray puts sockets, whose paths may have 107 characters, deep below it
_CONNECT_S = 5.0
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class RaySettings:
    """Ray resources of a run.

    Attributes
    ----------
    address : str or None
        "auto" or HOST:PORT of a cluster; None starts Ray on this machine, which ends with the run.
    workers : int or None
        Actors, >= 1; one per CPU if None.
    gpus_per_actor : float
        GPUs of an actor, >= 0; may be a fraction.
    object_store_bytes : int or None
        Size of a private Ray's object store; Ray's choice if None.
    """

    address: str | None = None
    workers: int | None = None
    gpus_per_actor: float = 0.0
    object_store_bytes: int | None = None


@dataclass(frozen=True)
class RayNode:
    """A node of the cluster.

    Attributes
    ----------
    node_id : str
        Ray's id, which is new at each start of the node.
    name : str
        Its number and address, for the user.
    slots : int
        Actors that fit on it.
    """

    node_id: str
    name: str
    slots: int


@contextmanager
def ray_of(settings: RaySettings, num_cpus: int) -> Iterator[Any]:
    """Start or join Ray; yield the module ``ray``.

    Parameters
    ----------
    num_cpus : int
        CPUs of a private Ray.

    Raises
    ------
    ConfigError
        If there is no such cluster, or this process uses Ray already.
    FedLPError
        If Ray is not installed or does not start.
    """
    if settings.address not in (None, "auto"):
        _check_answers(str(settings.address))
    if find_spec("ray") is None:
        raise FedLPError("simulation=ray needs Ray; run: pip install 'fedlp[ray]'")
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        if ray.is_initialized():
            if settings.address != "auto":
                raise ConfigError(
                    "this process has started Ray: set simulation.address=auto to use it, or call ray.shutdown()"
                )
            yield ray
            return
        where = _private(settings, num_cpus, stack) if settings.address is None else {"address": settings.address}
        try:
            with _signals_kept():
                ray.init(log_to_driver=False, configure_logging=False, **where)
        except (OSError, RuntimeError, ValueError) as error:
            kind = FedLPError if settings.address is None else ConfigError
            place = "Ray does not start" if settings.address is None else f"simulation.address={settings.address}"
            raise kind(f"{place}: {one_line(error)}") from error
        try:
            yield ray
        finally:
            ray.shutdown()


def find_nodes(ray: Any, gpus_per_actor: float) -> list[RayNode]:
    """Return the nodes with room for an actor, in the order of their addresses.

    Raises
    ------
    ConfigError
        If there is none.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    alive.sort(key=lambda node: (node["NodeManagerAddress"], node["NodeName"], node["NodeID"]))
    found = []
    for number, node in enumerate(alive, start=1):
        slots = int(node["Resources"].get("CPU", 0))
        if gpus_per_actor:
            slots = min(slots, _gpu_slots(node["Resources"].get("GPU", 0), gpus_per_actor))
        if slots:
            found.append(RayNode(node["NodeID"], f"node {number} ({node['NodeManagerAddress']})", slots))
    if not found:
        wanted = f"1 CPU and {gpus_per_actor:g} GPU" if gpus_per_actor else "1 CPU"
        raise ConfigError(f"no node of the Ray cluster has {wanted} for a client; add nodes, or ask for less")
    return found


def place_actors(nodes: list[RayNode], count: int) -> list[RayNode]:
    """Return the node of each of at most ``count`` actors, spread evenly over the nodes."""
    rounds = range(max(node.slots for node in nodes))
    return [node for number in rounds for node in nodes if number < node.slots][:count]


def _gpu_slots(gpus: float, per_actor: float) -> int:
    """Return the actors that fit on GPUs; those of a fraction share one GPU, others have whole ones."""
    return int(gpus) * int(1 / per_actor + 1e-9) if per_actor < 1 else int(gpus // per_actor)


def _private(settings: RaySettings, num_cpus: int, stack: ExitStack) -> dict[str, Any]:
    """Return the arguments that start Ray on this machine."""
    found: dict[str, Any] = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
    if not settings.gpus_per_actor:
        found["num_gpus"] = 0
    if settings.object_store_bytes is not None:
        found["object_store_memory"] = settings.object_store_bytes
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedlp-", ignore_cleanup_errors=True))
    return found if len(folder) > _LONGEST_FOLDER else {**found, "_temp_dir": folder}


def _check_answers(address: str) -> None:
    """Raise ConfigError if nothing listens at an address."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"simulation.address={address}: no Ray cluster answers there ({one_line(error)}); give HOST:PORT of its "
            "head node, as ray start --head prints it"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Ask Ray, by the environment, for silence and no statistics of use; what the user has set stays."""
    added = [name for name in _QUIET if name not in os.environ]
    os.environ.update({name: _QUIET[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
