"""The commands of ``docker/``, as they stand there, on loopback and without containers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlp.simulation.flower_process import end_processes, free_port, start_process
from tests.deploy.containers import DOCKER, command_line, health_command, image, services, target_of
from tests.integration.running import read

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]
PATIENCE_S = 600
NODES = [f"supernode-{i}" for i in range(4)]
PROGRAMS = Path(sys.executable).parent


class Container:
    """A service as a process of this machine: its own folders for the container's, a port of loopback for its."""

    def __init__(self, service: Mapping[str, Any], own: Path, port: int, elsewhere: Mapping[str, str]) -> None:
        self.service, self.own, self.port, self.image = service, own, port, image(target_of(service))
        self.values = {
            "/opt/fedlp/bin": str(PROGRAMS),
            "/opt/fedlp/health.py": str(DOCKER / "health.py"),
            "/run/secrets": str(self.own / "secrets"),
            "0.0.0.0": "127.0.0.1",
            **dict.fromkeys(("8000", "9094", "9099"), str(port)),
            self.image.user: f"{os.getuid()}:{os.getgid()}",
        }
        for source, target in (volume.split(":")[:2] for volume in service["volumes"]):
            self.values[target] = str(
                (DOCKER / source).resolve() if source[0] in "./" else own.parent / "volumes" / source
            )
        self.values |= elsewhere
        self.state = Path(self.values.setdefault(self.image.folder, str(own)))
        for path in (self.state, self.own / "secrets"):
            path.mkdir(parents=True, exist_ok=True)
        self.secrets = {target: self.own / "secrets" / target for target in service["secrets"]}
        for target, path in self.secrets.items():
            path.unlink(missing_ok=True)
            path.symlink_to(DOCKER / service["secrets"][target])
        self.line = [self.here(word) for word in command_line(service)]
        self.env = {key: self.here(value) for key, value in (self.image.env | service.get("environment", {})).items()}
        self.env["PATH"] = self.env["PATH"].replace("$PATH", os.environ["PATH"])
        self.env["TMPDIR"] = str(self.own)

    def here(self, text: str) -> str:
        """Return a text with this machine's values for the container's."""
        inside = "|".join(re.escape(word) for word in sorted(self.values, key=len, reverse=True))
        return re.sub(inside, lambda match: self.values[match[0]], text)

    def start(self) -> None:
        """Start its command, and wait until its health command says that it is well."""
        assert not self.is_well()
        self.log = self.own / "log"
        more = ["--port", str(self.port)] if target_of(self.service) == "client" else []  # several on one machine
        self.process = start_process([*self.line, *more], self.env, self.state, self.log)
        self.await_that(self.is_well)

    def await_that(self, is_so: Callable[[], bool]) -> None:
        """Wait for something while the process runs."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.3)

    def is_well(self) -> bool:
        """Run its health command."""
        line = [self.here(word) for word in health_command(self.service)]
        done = subprocess.run(line, env=self.env, cwd=self.state, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or "does not answer" in done.stderr, done.stderr
        return done.returncode == 0

    def stop(self) -> None:
        """Stop it as an engine does."""
        self.process.send_signal(signal.Signals[self.image.stop_signal])
        self.process.wait(timeout=PATIENCE_S)


class Federation:
    """``compose.yaml``, brought up in its order.

    Attributes
    ----------
    running : dict
        SuperLink, SuperExec and SuperNodes by their services' names.
    """

    def __init__(self, folder: Path) -> None:
        self.running: dict[str, Container] = {}
        self.out = folder / "volumes" / "serverapp" / "runs" / "first"
        self._folder, self._port = folder, free_port()
        self._services = services("compose.yaml", {"KEYS": str(folder / "keys")})
        self._elsewhere = {
            "superlink:8000": f"127.0.0.1:{self._port}",
            "/src/docker/run.toml": str(folder / "run.toml"),
            "/run/flwr": str(folder / "flwr"),
        }
        self._write_here(folder / "run.toml", {"/var/lib/fedlp/runs/first": str(self.out)})
        self._write_here(folder / "flwr" / "config.toml", self._elsewhere | {"/run/secrets": str(folder / "keys")})

    def call(self, name: str) -> str:
        """Run a service to its end, and return what it printed."""
        made = self._container(name, self._services[name])
        done = subprocess.run(
            made.line, env=made.env, cwd=made.state, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str, service: Mapping[str, Any] | None = None) -> Container:
        """Start a service, by default of ``compose.yaml``, and wait until it is well."""
        self.running[name] = self._container(name, service or self._services[name])
        self.running[name].start()
        return self.running[name]

    def end(self) -> None:
        end_processes([made.process for made in self.running.values()], self._folder)

    def _container(self, name: str, service: Mapping[str, Any]) -> Container:
        port = self._port if name == "superlink" else free_port()
        return Container(service, self._folder / name, port, self._elsewhere)

    def _write_here(self, path: Path, values: Mapping[str, str]) -> None:
        """Write a file of ``docker/`` with this machine's values."""
        text = (DOCKER / path.name).read_text()
        for old, new in values.items():
            text = text.replace(old, new)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    """Follow ``docs/docker.md``: make keys, start everything, run ``run.toml``."""
    folder = Path(tempfile.mkdtemp(prefix="docker-"))
    made = Federation(folder)
    try:
        made.call("keys")
        made.start("superlink")
        made.call("register")
        for name in ("serverapp", *NODES):
            made.start(name)
        made.call("run")
        yield made
    finally:
        made.end()
        shutil.rmtree(folder)


def test_the_run_meets_every_budget(federation: Federation) -> None:
    run = read(federation.out)
    assert [line["cohort"] for line in run.rounds] == [[0, 1, 2, 3]] * 2
    assert run.failures == []
    assert run.config.upload.name == "int4"  # two numbers a byte
    for i, name in enumerate(NODES):
        node_config = federation.running[name].line[-1]
        budget = yaml.safe_load(Path(re.findall('budget="(.*)"', node_config)[0]).read_text())
        for line in run.rounds:
            cost = line["clients"][i]
            assert cost["client_id"] == i
            assert 0 < cost["params_up"] <= 2 * budget.get("upload_bytes", budget.get("params"))
            assert cost["params_down"] <= budget.get("params", cost["params_down"])
    up = {cost["client_id"]: cost["params_up"] for cost in reversed(run.rounds[0]["clients"])}  # calibration is behind
    assert len(set(up.values())) == 4


def test_only_their_user_reads_the_keys(federation: Federation) -> None:
    secrets = {name: path for made in federation.running.values() for name, path in made.secrets.items()}
    modes = {name: path.stat().st_mode & 0o077 for name, path in secrets.items()}
    assert {name for name, others in modes.items() if others} == {"ca.crt", "server.crt"}


def test_keys_are_registered_once(federation: Federation) -> None:
    assert federation.call("register") == ""


def test_the_device_takes_a_clients_place(federation: Federation, tmp_path: Path) -> None:
    left = federation.running[NODES[3]]
    left.stop()
    assert not left.is_well()
    for name, path in left.secrets.items():
        shutil.copy(path, tmp_path / name)
    settings = {"KEYS": str(tmp_path), "SUPERLINK": "superlink:8000", "PARTITION": "3", "PARTITIONS": "4"}
    device = federation.start("device", services("compose.device.yaml", settings)["supernode"])
    device.await_that(lambda: "SuperNode ID: " in device.log.read_text())


def test_stopped_services_are_not_well(federation: Federation) -> None:
    for name in ("serverapp", "superlink"):
        federation.running[name].stop()
        assert not federation.running[name].is_well()
