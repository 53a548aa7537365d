"""The commands of ``docs/deployment.md`` and its systemd unit, as they stand there, on loopback."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlp.simulation.flower_process import (
    await_superlink,
    end_processes,
    find_flwr,
    flower_env,
    free_port,
    start_process,
)
from tests.deploy.bench import await_words
from tests.integration.running import read

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]
CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE_S = 900
Process = subprocess.Popen[bytes]


class Recipe:
    """The document's commands, for one machine: its folders in place of the document's, its ports, loopback."""

    def __init__(self, folder: Path) -> None:
        program = find_flwr()
        assert program is not None
        self.env = flower_env(program, folder / "home")
        (folder / "home").mkdir()
        self.port = free_port()
        self.folder = folder
        self.processes: list[Process] = []
        self._text = self.here((CHECKOUT / "docs" / "deployment.md").read_text())

    def here(self, text: str) -> str:
        """Return a text with this machine's values."""
        values = {
            "--host 0.0.0.0 --port 8000": f"--host 127.0.0.1 --port {self.port}",
            "superlink.example:8000": f"127.0.0.1:{self.port}",
            "/var/lib/fedlp": str(self.folder / "var"),
            "/etc/fedlp/ca.crt": str(self.folder / "keys" / "ca.crt"),
        }
        for old, new in values.items():
            text = text.replace(old, new)
        return text

    def lines(self, program: str) -> list[list[str]]:
        """Return the document's command lines of a program."""
        blocks = re.findall(r"^```sh\n(.*?)^```", self._text, re.DOTALL | re.MULTILINE)
        whole = "".join(blocks).replace("\\\n", " ").splitlines()
        found = [shlex.split(line) for line in whole if line.startswith(program)]
        assert found, f"no {program} in the document"
        return found

    def settings(self, name: str) -> str:
        """Return the document's TOML block that holds a name."""
        blocks = re.findall(r"^```toml\n(.*?)^```", self._text, re.DOTALL | re.MULTILINE)
        (found,) = [block for block in blocks if name in block]
        return str(found)

    def call(self, line: list[str], cwd: Path | None = None) -> str:
        """Run a command to its end."""
        done = subprocess.run(
            line, env=self.env, cwd=cwd or self.folder, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, line: list[str], name: str) -> Path:
        """Start a command, and return its log."""
        log = self.folder / f"{name}.log"
        self.processes.append(start_process(line, self.env, self.folder, log))
        return log

    def start_superlink(self) -> None:
        """Follow the document until its allow-list."""
        for program in ("fedlp-certs", "openssl", "chmod"):
            for line in self.lines(program):
                self.call(line)
        for line in self.lines("flower-superlink"):
            self.start(line, "superlink")
        await_superlink(self.port, self.processes[0], self.folder / "keys" / "ca.crt")
        for line in self.lines("flower-superexec"):
            self.start(line, "superexec")
        (self.folder / "home" / "config.toml").write_text(self.settings("[superlink.prod]"))
        for line in self.lines("flwr supernode register"):
            self.call(line)


@pytest.fixture
def recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recipe]:
    with _ended(Recipe(folder)) as running:
        monkeypatch.setenv("PATH", running.env["PATH"])
        yield running


@contextmanager
def _ended(recipe: Recipe) -> Iterator[Recipe]:
    try:
        yield recipe
    finally:
        end_processes(recipe.processes, recipe.folder)


def test_the_commands_of_the_document_run_a_federation(recipe: Recipe) -> None:
    recipe.start_superlink()
    for line in recipe.lines("fedlp-profile"):
        recipe.call(line)
    for i, line in enumerate(recipe.lines("flower-supernode")):  # two on one machine need a port each
        recipe.start([*line, "--port", str(free_port())], f"supernode-{i}")
    for settings in (recipe.settings("out = "), recipe.settings("resume=")):
        (recipe.folder / "run.toml").write_text(settings)
        for line in recipe.lines("flwr run"):
            where = [str(recipe.folder / word) if word == "run.toml" else word for word in line]
            recipe.call(where, cwd=CHECKOUT)
    run = read(recipe.folder / "var" / "runs" / "first")
    assert [line["cohort"] for line in run.rounds] == [[0, 1]] * 4
    assert run.failures == []
    assert run.config.upload.name == "int4"
    for line in run.rounds:  # the second device's budget, at two numbers a byte
        up = {cost["client_id"]: cost["params_up"] for cost in line["clients"]}
        assert 0 < up[1] <= 100_000 < up[0]
    listed = json.loads(recipe.call(["flwr", "supernode", "ls", "prod", "--format", "json"]))
    assert [node["status"] for node in listed["nodes"]] == ["online"] * 2
    (superexec,) = recipe.lines("flower-superexec")
    recipe.start(superexec[: superexec.index("--superexec-auth-secret-file")], "intruder")
    await_words(recipe.folder / "superlink.log", "SuperExec authentication failed")
    for line in recipe.lines("fedlp-export"):
        recipe.call(line)
    assert (run.path / "artefacts" / "client-0" / "model.onnx").is_file()
    assert list(json.loads((run.path / "budgets.json").read_text())) == ["1"]


def test_the_units_command_joins(recipe: Recipe) -> None:
    recipe.start_superlink()
    unit = (CHECKOUT / "docs" / "fedlp-supernode.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    (line,) = re.findall(r"^printf '%s\\n' (.*) \| sudo tee /etc/fedlp/supernode.env$", recipe._text, re.MULTILINE)
    names = dict(word.split("=", 1) for word in shlex.split(line))
    names["NODE_CONFIG"] = names["NODE_CONFIG"].strip("'")  # as systemd reads the file
    credentials = recipe.folder / "credentials"
    credentials.mkdir()
    os.link(recipe.folder / "keys" / "supernodes" / "supernode-0", credentials / "key")
    names["CREDENTIALS_DIRECTORY"] = str(credentials)
    words = [re.sub(r"\$\{(\w+)\}", lambda match: names[match[1]], word) for word in recipe.here(command).split()]
    words[0] = Path(words[0]).name
    log = recipe.start([*words, "--port", str(free_port())], "unit")
    deadline = time.monotonic() + PATIENCE_S
    while "SuperNode ID: " not in log.read_text():
        assert recipe.processes[-1].poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
