"""Deployed federation on one machine: a SuperLink with TLS and an allow-list of keys, and SuperNodes.

ServerApps are children of their own SuperExec, so that they survive a restart of the SuperLink.

The processes and their options are those of real hosts; only the addresses are loopback's. Every SuperNode has a
folder, a key and a counted connection of its own, and may run on another :class:`Host`. All of it ends with the
``with`` block.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from fedlp.apps.deployment.certificates import Certificates
from fedlp.apps.deployment.wire import CountingProxy
from fedlp.errors import FedLPError
from fedlp.simulation.flower_process import (
    SUPERLINK,
    RoundLines,
    await_superlink,
    call_flwr,
    end_processes,
    find_flwr,
    flower_env,
    follow_run,
    free_port,
    start_process,
    write_run_config,
)


class Wire(Protocol):
    """Bytes of a SuperNode's connection so far: ``up`` to the SuperLink, ``down`` from it."""

    @property
    def up(self) -> int: ...  # noqa: D102
    @property
    def down(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Host:
    """Host of a SuperNode other than the SuperLink's.

    Attributes
    ----------
    enter : tuple of str
        Prefix of a command that runs it there.
    superlink : str
        Address of the SuperLink from there.
    wire : Wire
        Counter of the bytes of its connection.
    """

    enter: tuple[str, ...]
    superlink: str
    wire: Wire


@dataclass(frozen=True)
class SuperNode:
    """One running SuperNode.

    Attributes
    ----------
    wire : Wire
        Its connection to the SuperLink.
    log : Path
        Output of the node and its ClientApps.
    """

    process: subprocess.Popen[bytes]
    wire: Wire
    log: Path


class LoopbackFederation:
    """A SuperLink on a free port, a SuperExec for its ServerApps, and SuperNodes.

    Attributes
    ----------
    superlink : Popen
        Its process; :meth:`start_superlink` replaces one that has ended.

    Parameters
    ----------
    scratch : Path
        An empty folder; every process works below it.
    logs : Path
        Folder of ``superlink.log``, ``superexec.log`` and ``NAME.log`` of every SuperNode.
    listen : str
        Listening address of the SuperLink; it must include loopback.
    """

    def __init__(self, scratch: Path, certificates: Certificates, logs: Path, listen: str = "127.0.0.1") -> None:
        self.superlink: subprocess.Popen[bytes]
        self.nodes: dict[str, SuperNode] = {}
        program = find_flwr()
        if program is None:
            raise FedLPError("there is no flwr on this machine; run: pip install 'flwr>=1.41,<1.43'")
        self._program = program
        self._scratch = scratch
        self._certificates = certificates
        self._logs = logs
        self._listen = listen
        self._port = free_port()
        self._env = flower_env(program, scratch / "cli")
        self._secret = scratch / "superexec.secret"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._wires = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._write_settings()
            self.start_superlink()
            self._start_superexec()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        end_processes(self._processes, self._scratch)
        self._wires.close()

    def start_superlink(self) -> None:
        """Start the SuperLink, and wait until it answers; after a kill it resumes from its database."""
        made = self._certificates
        command = [self._path("flower-superlink"), "--ssl-ca-certfile", str(made.ca)]
        command += ["--ssl-certfile", str(made.server), "--ssl-keyfile", str(made.server_key)]
        command += ["--enable-supernode-auth", "--isolation", "process"]
        command += ["--superexec-auth-secret-file", str(self._secret), "--database", "state.db"]
        command += ["--host", self._listen, "--port", str(self._port)]
        self.superlink = self._start(command, "superlink")
        await_superlink(self._port, self.superlink, made.ca)

    def register(self, public_key: Path) -> None:
        """Put a SuperNode's public key on the SuperLink's allow-list."""
        call_flwr([self._program, "supernode", "register", str(public_key), SUPERLINK], self._env)

    def start_node(
        self,
        name: str,
        node_config: Mapping[str, int | str],
        key: Path | None,
        ca: Path | None = None,
        host: Host | None = None,
    ) -> SuperNode:
        """Start a SuperNode in a folder of its own.

        Parameters
        ----------
        key : Path or None
            Its private key.
        ca : Path, optional
            Trusted CA; by default, that of the SuperLink's certificate.
        host : Host, optional
            Host of the node; by default, the SuperLink's.
        """
        if host is None:
            wire: Wire = (proxy := self._wires.enter_context(CountingProxy(self._port)))
            address = proxy.address
        else:
            wire, address = host.wire, f"{host.superlink}:{self._port}"
        settings = " ".join(
            f'{option}="{value}"' if isinstance(value, str) else f"{option}={value}"
            for option, value in node_config.items()
        )
        command = [*(host.enter if host else ()), self._path("flower-supernode"), "--superlink", address]
        command += ["--root-certificates", str(ca or self._certificates.ca)]
        command += ["--auth-supernode-private-key", str(key)] if key else []
        command += ["--host", "127.0.0.1", "--port", str(free_port()), "--node-config", settings]
        process = self._start(command, name)
        self.nodes[name] = SuperNode(process, wire, self._logs / f"{name}.log")
        return self.nodes[name]

    def run(self, app: Path, settings: Mapping[str, str], on_line: Callable[[dict[str, Any]], None]) -> None:
        """Submit a run with ``flwr run`` and wait for its end.

        Parameters
        ----------
        app : Path
            Folder of a Flower app.
        settings : mapping
            Run config; ``out`` is the output folder of the ServerApp.
        on_line : callable
            Called with every round as it appears in ``rounds.jsonl``.

        Raises
        ------
        FedLPError
            If the run does not finish.
        """
        outcome, out = self._scratch / "outcome.json", Path(settings["out"])
        outcome.unlink(missing_ok=True)  # an earlier run's
        run_config = write_run_config(self._scratch / "run.toml", {**settings, "outcome": str(outcome)})
        call_flwr([self._program, "run", str(app), SUPERLINK, "--run-config", str(run_config)], self._env)
        lines = RoundLines(out / "rounds.jsonl", on_line)
        follow_run(self._program, self._env, outcome, lines, log=self._logs / "flower.log")

    def _write_settings(self) -> None:
        home = self._scratch / "cli"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{SUPERLINK}"\n\n[superlink.{SUPERLINK}]\n'
            f'address = "127.0.0.1:{self._port}"\nroot-certificates = "{self._certificates.ca}"\n'
        )
        self._secret.touch(mode=0o600)
        self._secret.write_bytes(secrets.token_bytes(32))

    def _start_superexec(self) -> None:
        command = [self._path("flower-superexec"), "--runtime-api-address", f"127.0.0.1:{self._port}"]
        command += ["--root-certificates", str(self._certificates.ca)]
        self._start([*command, "--superexec-auth-secret-file", str(self._secret)], "superexec")

    def _start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        """Start a process in its own folder, with its own Flower settings."""
        folder = self._scratch / name
        (folder / "home").mkdir(parents=True, exist_ok=True)
        env = flower_env(self._program, folder / "home")
        process = start_process(command, env, folder, self._logs / f"{name}.log")
        self._processes.append(process)
        return process

    def _path(self, program: str) -> str:
        return str(Path(self._program).with_name(program))
