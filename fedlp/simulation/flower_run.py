"""The same apps under ``flwr run``, on Flower's simulation runtime (Ray), as a child process.

A private SuperLink is started for the run and ended with it; nothing is left running, and the user's Flower settings
are not touched. ``flwr run`` exits with 0 even when a run fails, so the run's status is read from the SuperLink.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlp.errors import FedLPError

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
"""
_POLL_S = 0.3
_START_TIMEOUT_S = 60.0


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
        If Ray is not installed, Flower does not start, or the run does not finish; with Flower's own reason.
    """
    program = shutil.which("flwr", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None or not _has_ray():
        raise FedLPError("simulation=ray needs Flower's simulation extra; run: pip install 'fedlp[ray]'")
    with tempfile.TemporaryDirectory(prefix="fedlp-flower-") as scratch, _superlink(Path(scratch), program) as env:
        app = Path(scratch) / "app"
        (app / "fedlp_flower").mkdir(parents=True)
        (app / "pyproject.toml").write_text(_PROJECT)
        (app / "fedlp_flower" / "__init__.py").write_text('"""fedlp under flwr run."""\n')
        (app / "fedlp_flower" / "apps.py").write_text(_APP)
        settings = Path(scratch) / "run.toml"
        # A JSON string is a TOML basic string.
        settings.write_text(f"cfg = {json.dumps(cfg)}\nout = {json.dumps(str(out.absolute()))}\n")
        federation = f"num-supernodes={num_clients} client-resources-num-cpus=1 init-args-num-cpus={workers}"
        command = [program, "run", str(app), "local", "--run-config", str(settings)]
        _flwr([*command, "--federation-config", federation], env)
        _follow(program, env, out / "rounds.jsonl", on_line, seen)


def _follow(
    program: str, env: dict[str, str], rounds: Path, on_line: Callable[[dict[str, Any]], None], seen: int
) -> None:
    """Report rounds as they are written until the run has ended; raise unless it completed."""
    while True:
        run = json.loads(_flwr([program, "ls", "local", "--format", "json"], env))["runs"][0]
        lines = rounds.read_text().splitlines(keepends=True) if rounds.is_file() else []
        complete = [line for line in lines if line.endswith("\n")]
        for line in complete[seen:]:
            on_line(json.loads(line))
        seen = max(seen, len(complete))
        if run["status"].startswith("finished"):
            if run["status"] != "finished:completed":
                raise FedLPError(f"the run ended as {run['status']} on Flower: {_reason(run, env)}")
            return
        time.sleep(_POLL_S)


def _reason(run: dict[str, Any], env: dict[str, str]) -> str:
    """Return the last error line of the SuperLink's log, or Flower's own details."""
    log = Path(env["FLWR_HOME"]) / "superlink.log"
    errors = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line] if log.is_file() else []
    return errors[-1].strip() if errors else str(run.get("status-details", "no details"))


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
    with (home / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=env, cwd=scratch, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _await_health(port, process)
            yield env
        finally:
            _end_session(process)


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


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its session, the Ray processes it started included."""
    import signal

    for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _flwr(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise FedLPError(f"{' '.join(command[1:3])} failed: {lines[-1].strip() if lines else 'no output'}")
    return done.stdout


def _has_ray() -> bool:
    from importlib.util import find_spec

    return find_spec("ray") is not None
