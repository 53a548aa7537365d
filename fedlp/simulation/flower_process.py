"""Flower's own programs as child processes: private start, control by ``flwr``, complete end.

Nothing here touches the user's Flower settings: every process gets a ``FLWR_HOME`` of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedlp.errors import FedLPError
from fedlp.simulation.outcome import read_outcome

_APP = '''"""Stands for the installed fedlp in Flower's app bundle."""

import fedlp.apps.runs

server_app = fedlp.apps.runs.server_app
client_app = fedlp.apps.runs.client_app
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
SUPERLINK = "local"  # what ``config.toml`` calls the SuperLink of a run
_POLL_S = 0.3
_ASK_FLOWER_S = 15.0  # each time costs about a second of one core
_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 10.0
_PR_SET_PDEATHSIG = 1


def find_flwr() -> str | None:
    """Return the path of ``flwr``, this environment's own before any other; None if there is none."""
    return shutil.which("flwr", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def flower_env(program: str, home: Path) -> dict[str, str]:
    """Return the environment of Flower's programs: settings in ``home``, nothing installed, nothing sent home."""
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(program).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(Path.cwd())]),  # user's parts
    }


def free_port() -> int:
    """Return a TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_process(command: list[str], env: Mapping[str, str], folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start a program in a folder with a log, without Ctrl-C, that ends with this process."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            env=dict(env),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to handle
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


def _end_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies; Flower's own children follow."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def await_superlink(port: int, process: subprocess.Popen[bytes], ca: Path | None = None) -> None:
    """Wait until a SuperLink on this machine answers; FedLPError if it does not.

    Parameters
    ----------
    ca : Path, optional
        The CA that its certificate must be signed by; without, it is asked without TLS.
    """
    context = None if ca is None else ssl.create_default_context(cafile=str(ca))
    url = f"{'http' if ca is None else 'https'}://127.0.0.1:{port}/health"
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise FedLPError(f"flower-superlink ended with exit code {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(url, timeout=1, context=context):
                return
        except OSError:
            time.sleep(_POLL_S)
    raise FedLPError(f"flower-superlink was not ready within {_START_TIMEOUT_S:g} s")


def end_processes(processes: Iterable[subprocess.Popen[bytes]], folder: Path) -> None:
    """End processes and all others in a folder: Flower moves some into another session."""
    for process in processes:
        process.kill()
        process.wait()
    deadline = time.monotonic() + _END_TIMEOUT_S
    quiet = 0  # somebody may be starting another process at this moment: look again
    while quiet < 3 and time.monotonic() < deadline:
        found = processes_in(folder)
        quiet = 0 if found else quiet + 1
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def processes_in(folder: Path) -> list[int]:
    """Return the living processes in a folder or below it; none without /proc.

    All processes of a run share the folder: Ray's workers write their title over their environment.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "cwd").readlink().is_relative_to(folder.resolve()):
                found.append(int(entry.name))
    return found


# ---- flwr
def call_flwr(command: list[str], env: Mapping[str, str]) -> str:
    """Run ``flwr`` and return its output; FedLPError with its message if it fails."""
    done = subprocess.run(command, env=dict(env), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line.strip(" │╭╮╰╯─") for line in (done.stdout + done.stderr).splitlines()]
        raise FedLPError(f"flwr {command[1]} failed: {' '.join(filter(None, said)) or 'no output'}")
    return done.stdout


def write_app(folder: Path) -> Path:
    """Write the app bundle of the installed fedlp, and return its folder."""
    app = folder / "app"
    (app / "fedlp_flower").mkdir(parents=True)
    (app / "pyproject.toml").write_text(_PROJECT)
    (app / "fedlp_flower" / "__init__.py").write_text('"""fedlp under flwr run."""\n')
    (app / "fedlp_flower" / "apps.py").write_text(_APP)
    return app


def write_run_config(path: Path, settings: Mapping[str, str]) -> Path:
    """Write the file for ``flwr run --run-config``, and return its path."""
    # A JSON string is a TOML basic string.
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    return path


class RoundLines:
    """Reader of rounds from a file that another process writes.

    Parameters
    ----------
    on_line : callable
        Called with every new round beyond the first ``seen``.
    """

    def __init__(self, path: Path, on_line: Callable[[dict[str, Any]], None], seen: int = 0) -> None:
        self._path = path
        self._on_line = on_line
        self._seen = seen

    def report(self) -> None:
        """Report the new complete rounds."""
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.is_file() else []
        complete = [line for line in lines if line.endswith(b"\n")]
        for line in complete[self._seen :]:
            self._on_line(json.loads(line))
        self._seen = max(self._seen, len(complete))


def follow_run(program: str, env: Mapping[str, str], outcome: Path, lines: RoundLines, log: Path) -> None:
    """Report rounds until the run is over.

    Parameters
    ----------
    outcome : Path
        File with the ServerApp's outcome.
    log : Path
        File for Flower's log if the run ends without an outcome.

    Raises
    ------
    FedLPError
        With the reason of the failure.
    """
    asked = time.monotonic()
    while True:
        is_over = outcome.is_file()
        lines.report()
        if is_over:
            return read_outcome(outcome)
        if time.monotonic() - asked > _ASK_FLOWER_S:
            run = json.loads(call_flwr([program, "ls", SUPERLINK, "--format", "json"], env))["runs"][0]
            if run["status"].startswith("finished") and not outcome.is_file():
                log.write_text(call_flwr([program, "log", str(run["run-id"]), SUPERLINK, "--show"], env))
                raise FedLPError(f"Flower could not run the ServerApp; its log is {log}")
            asked = time.monotonic()
        time.sleep(_POLL_S)
