"""The same apps under ``flwr run``, on Flower's simulation runtime (Ray), as a child process.

A private SuperLink is started for the run and ended with it; nothing is left running, and the user's Flower settings
are not touched. ``flwr run`` exits with 0 even when a run fails and Flower keeps no reason, so the ServerApp leaves a
file that says how it ended; what Flower says is asked for now and then, in case the ServerApp never got that far.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedlp.errors import FedLPError
from fedlp.federation.server_app import read_outcome

_APP = '''"""Stands for the installed fedlp in Flower's app bundle."""

import fedlp.assembly

server_app = fedlp.assembly.server_app
client_app = fedlp.assembly.client_app
'''
_PROJECT = """[project]
name = "fedlp-flower"
version = "1.0.0"
description = "fedlp, as installed on this machine"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedlp"

[tool.flwr.app.components]
serverapp = "fedlp_flower.apps:server_app"
clientapp = "fedlp_flower.apps:client_app"

[tool.flwr.app.config]
cfg = ""
out = ""
outcome = ""
"""
_POLL_S = 0.3
_ASK_FLOWER_S = 15.0  # each time costs about a second of one core
_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 10.0
_LONGEST_RAY_FOLDER = 40  # Ray puts sockets, whose paths may have 107 characters, deep below it
_PR_SET_PDEATHSIG = 1


def run_on_flower(
    cfg: str, out: Path, num_clients: int, workers: int, on_line: Callable[[dict[str, Any]], None], seen: int = 0
) -> None:
    """Run the apps on Flower's simulation runtime and wait for the end.

    Parameters
    ----------
    cfg : str
        The composed config (YAML).
    out : Path
        The run directory; the ServerApp writes there.
    workers : int
        Ray actors of one CPU each.
    on_line : callable
        Told of every round as it appears in ``rounds.jsonl``, beyond the first ``seen``.

    Raises
    ------
    FedLPError
        If Ray is not installed, Flower does not start, or the run does not finish.
    """
    program = shutil.which("flwr", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None or find_spec("ray") is None:
        raise FedLPError("simulation=ray needs Flower's simulation extra; run: pip install 'fedlp[ray]'")
    with tempfile.TemporaryDirectory(prefix="fedlp-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        outcome = scratch / "outcome.json"
        app = scratch / "app"
        (app / "fedlp_flower").mkdir(parents=True)
        (app / "pyproject.toml").write_text(_PROJECT)
        (app / "fedlp_flower" / "__init__.py").write_text('"""fedlp under flwr run."""\n')
        (app / "fedlp_flower" / "apps.py").write_text(_APP)
        settings = {"cfg": cfg, "out": str(out.absolute()), "outcome": str(outcome)}
        # A JSON string is a TOML basic string.
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
        (scratch / "run.toml").write_text("".join(lines))
        federation = f"num-supernodes={num_clients} client-resources-num-cpus=1 init-args-num-cpus={workers}"
        command = [program, "run", str(app), "local", "--run-config", str(scratch / "run.toml")]
        with _superlink(scratch, program) as env:
            _flwr([*command, "--federation-config", federation], env)
            log = _follow(program, env, outcome, _Lines(out / "rounds.jsonl", on_line, seen))
        if log is not None:
            (out / "flower.log").write_text(log)
            raise FedLPError(f"Flower could not run the ServerApp; its log is {out / 'flower.log'}")
        read_outcome(outcome)


class _Lines:
    """The rounds of a file that another process is writing."""

    def __init__(self, path: Path, on_line: Callable[[dict[str, Any]], None], seen: int) -> None:
        self._path = path
        self._on_line = on_line
        self._seen = seen

    def report(self) -> None:
        """Report the rounds that are new and whole."""
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.is_file() else []
        complete = [line for line in lines if line.endswith(b"\n")]
        for line in complete[self._seen :]:
            self._on_line(json.loads(line))
        self._seen = max(self._seen, len(complete))


def _follow(program: str, env: dict[str, str], outcome: Path, lines: _Lines) -> str | None:
    """Report rounds until the ServerApp has said how it ended; return Flower's log if the run is over without that."""
    asked = time.monotonic()
    while True:
        is_over = outcome.is_file()
        lines.report()
        if is_over:
            return None
        if time.monotonic() - asked > _ASK_FLOWER_S:
            run = json.loads(_flwr([program, "ls", "local", "--format", "json"], env))["runs"][0]
            if run["status"].startswith("finished") and not outcome.is_file():
                return _flwr([program, "log", str(run["run-id"]), "local", "--show"], env)
            asked = time.monotonic()
        time.sleep(_POLL_S)


@contextmanager
def _superlink(scratch: Path, program: str) -> Iterator[dict[str, str]]:
    """Start a SuperLink in simulation mode on a free port and end it, with all its children, afterwards."""
    home = scratch / "home"
    home.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    env = os.environ | {
        "FLWR_HOME": str(home),
        **({"RAY_TMPDIR": str(scratch)} if len(str(scratch)) <= _LONGEST_RAY_FOLDER else {}),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(program).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    command = [str(Path(program).with_name("flower-superlink")), "--insecure", "--simulation"]
    command += ["--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--database", str(home / "state.db")]
    with (scratch / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=env,
            cwd=scratch,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to handle
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            _await_health(port, process)
            yield env
        finally:
            _end_all(process, scratch)


def _end_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies, however that happens; Flower's own children follow."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _await_health(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise FedLPError(f"flower-superlink ended with exit code {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except OSError:
            time.sleep(_POLL_S)
    raise FedLPError(f"flower-superlink was not ready within {_START_TIMEOUT_S:g} s")


def _end_all(superlink: subprocess.Popen[bytes], scratch: Path) -> None:
    """End the SuperLink and whatever it started: Flower puts part of it into another session, with all of Ray."""
    superlink.kill()
    superlink.wait()
    deadline = time.monotonic() + _END_TIMEOUT_S
    quiet = 0  # somebody may be starting another process at this moment: look again
    while quiet < 3 and time.monotonic() < deadline:
        found = processes_in(scratch)
        quiet = 0 if found else quiet + 1
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def processes_in(folder: Path) -> list[int]:
    """Return the living processes that work in a folder or below it; none where there is no /proc.

    The folder is what all processes of a run share: Ray's workers write their title over their environment.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "cwd").readlink().is_relative_to(folder.resolve()):
                found.append(int(entry.name))
    return found


def _flwr(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line.strip(" │╭╮╰╯─") for line in (done.stdout + done.stderr).splitlines()]
        raise FedLPError(f"flwr {command[1]} failed: {' '.join(filter(None, said)) or 'no output'}")
    return done.stdout
