"""A federation on hosts of its own: a SuperLink with TLS and an allow-list, and SuperNodes behind shaped links."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from fedlp.apps import runs as assembly
from fedlp.apps.deployment.certificates import Certificates, make_certificates
from fedlp.apps.deployment.loopback import LoopbackFederation, SuperNode
from fedlp.config import compose, to_yaml
from fedlp.simulation.flower_process import SUPERLINK, call_flwr, find_flwr, flower_env, write_app
from tests.deploy.network import Link, Network, why_no_network
from tests.integration.running import TINY, App, Finished, read
from tests.integration.running import run as run_here

PATIENCE_S, RUN_S = 240, 1200  # what one event may take, and what a run may
SMALL = (*TINY, "num_clients=2", "clients_per_round=2")
WHOLE = "strategy=fedavg"  # everybody sends everything: half a megabyte
TRAINS = "Receiving: train message"


def ignore(_: dict[str, Any]) -> None: ...


@dataclass
class Bench:
    """A running SuperLink that knows the keys of its clients' SuperNodes; none is started.

    Attributes
    ----------
    network : Network or None
        The hosts: ``superlink``, and one for every client; None where all run on loopback.
    """

    folder: Path
    certificates: Certificates
    federation: LoopbackFederation
    network: Network | None

    def start(self, i: int, name: str = "", *, host: str = "", enter: Sequence[str] = (), **options: Any) -> SuperNode:
        """Start a SuperNode as client ``i``.

        Parameters
        ----------
        name : str
            Of its folder and log, a new one for every start; by default ``supernode-I``.
        host : str
            Where it runs; by default ``node-I``.
        enter : sequence of str
            Words before its command.
        options
            ``key`` in place of its own (None: none), ``ca`` in place of the SuperLink's.
        """
        seat: dict[str, int | str] = {"partition-id": i, "num-partitions": len(self.certificates.node_keys)}
        seat["state-dir"] = str(self.folder / "clients")
        options = {"key": self.certificates.node_keys[i], **options}
        if self.network is not None:
            place = self.network.host(host or f"node-{i}")
            options["host"] = replace(place, enter=(*place.enter, *enter))
        return self.federation.start_node(name or f"supernode-{i}", seat, **options)

    def is_online(self, node: SuperNode) -> bool:
        """Return whether the SuperLink takes a SuperNode that has joined to be there."""
        program = find_flwr()
        assert program is not None
        env = flower_env(program, self.folder / "flower" / "cli")
        listed = json.loads(call_flwr([program, "supernode", "ls", SUPERLINK, "--format", "json"], env))["nodes"]
        (status,) = (found["status"] for found in listed if f"SuperNode ID: {found['node-id']}" in node.log.read_text())
        return bool(status == "online")

    def server_log(self) -> str:
        """Return what the ServerApp of the newest run has printed, as ``flwr log`` shows it."""
        program = find_flwr()
        assert program is not None
        env = flower_env(program, self.folder / "flower" / "cli")
        runs = json.loads(call_flwr([program, "ls", SUPERLINK, "--format", "json"], env))["runs"]
        return call_flwr([program, "log", str(runs[0]["run-id"]), SUPERLINK, "--show"], env)

    def run(self, out: Path, *overrides: str, on_line: Callable[[dict[str, Any]], None] = ignore) -> Finished:
        """Run a small config to its end; ``on_line`` is told of every round as it ends."""
        app = self.folder / "app"
        app = app if app.is_dir() else write_app(self.folder)
        cfg = to_yaml(compose((*SMALL, *overrides)))
        guard = threading.Timer(RUN_S, lambda: self.federation.superlink.kill())  # `flwr ls` fails then, and the test
        guard.start()
        try:
            self.federation.run(app, {"cfg": cfg, "out": str(out)}, on_line)
        finally:
            guard.cancel()
        return read(out)


@contextmanager
def bench(folder: Path, links: Sequence[Link] = (Link(), Link()), strangers: Sequence[str] = ()) -> Iterator[Bench]:
    """Make the network and start the SuperLink; this thread is on the SuperLink's host until the end.

    Parameters
    ----------
    links : sequence of Link
        Of the hosts ``node-0``, ``node-1``, ...: one client each.
    strangers : sequence of str
        Further hosts.
    """
    hosts = {"superlink": Link(), **{f"node-{i}": link for i, link in enumerate(links)}}
    hosts |= dict.fromkeys(strangers, Link())
    with (
        Network(hosts) as network,
        network.inside("superlink"),
        _superlink(folder, network, len(links)) as made,
    ):
        yield made


@contextmanager
def bench_or_loopback(folder: Path, strangers: Sequence[str] = ()) -> Iterator[Bench]:
    """Make two clients' bench; where that cannot be, the same without a network to shape."""
    with _superlink(folder, None, 2) if why_no_network() else bench(folder, strangers=strangers) as made:
        yield made


@contextmanager
def _superlink(folder: Path, network: Network | None, num_supernodes: int) -> Iterator[Bench]:
    address, listen = (network.address("superlink"), "0.0.0.0") if network else ("127.0.0.1", "127.0.0.1")
    certificates = make_certificates(folder / "certificates", (address,), num_supernodes)
    with LoopbackFederation(folder / "flower", certificates, folder, listen) as federation:
        for key in certificates.node_keys:
            federation.register(key.with_suffix(".pub"))
        yield Bench(folder, certificates, federation, network)


def await_true(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def await_words(log: Path, words: str, times: int = 1) -> None:
    """Wait until a log has said something so many times."""
    await_true(lambda: log.read_text().count(words) >= times, f"{log} never said {words!r} {times} times")


def absent(*missing: tuple[int, int]) -> App:
    """Return the clients' app for the local engine, without some clients (round, client) in some rounds."""

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            at = int(message.metadata.group_id), int(str(context.node_config["partition-id"]))
            assert at not in missing, "as on the bench"
        return assembly.client_app(message, context)

    return app


def assert_is_the_others_model(done: Finished, out: Path, *overrides: str) -> None:
    """Assert that a run ended with the bytes of a run of the local engine in which the same clients failed."""
    missing = sorted((server_round, client_id) for server_round, client_id, _ in done.failures)
    here = run_here(out, *SMALL, *overrides, app=absent(*missing))
    assert [(server_round, client_id) for server_round, client_id, _ in here.failures] == missing
    assert all(tensor.isfinite().all() for tensor in done.tensors.values())
    assert done.model == here.model
