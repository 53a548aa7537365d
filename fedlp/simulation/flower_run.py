"""Apps under ``flwr run``, on Flower's simulation runtime (Ray), as a child process.

A private SuperLink is started for the run and ended with it; nothing is left running, and the user's Flower settings
are not touched. ``flwr run`` exits with 0 even if a run fails and Flower keeps no reason, so the ServerApp writes a
file with its outcome; Flower's status is polled too, in case the ServerApp never starts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
    write_app,
    write_run_config,
)

_LONGEST_RAY_FOLDER = 40  # Ray puts sockets, whose paths may have 107 characters, deep below it


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
    program = find_flwr()
    if program is None or find_spec("ray") is None:
        raise FedLPError("simulation=flower needs Flower's simulation extra; run: pip install 'fedlp[ray]'")
    with tempfile.TemporaryDirectory(prefix="fedlp-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        outcome = scratch / "outcome.json"
        settings = {"cfg": cfg, "out": str(out.absolute()), "outcome": str(outcome)}
        command = [program, "run", str(write_app(scratch)), SUPERLINK]
        command += ["--run-config", str(write_run_config(scratch / "run.toml", settings))]
        federation = f"num-supernodes={num_clients} client-resources-num-cpus=1 init-args-num-cpus={workers}"
        with private_superlink(scratch, program) as env:
            call_flwr([*command, "--federation-config", federation], env)
            lines = RoundLines(out / "rounds.jsonl", on_line, seen)
            follow_run(program, env, outcome, lines, log=out / "flower.log")


@contextmanager
def private_superlink(scratch: Path, program: str) -> Iterator[dict[str, str]]:
    """Start a SuperLink in simulation mode on a free port and end it, with all its children, afterwards."""
    home, port = scratch / "home", free_port()
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{SUPERLINK}"\n\n'
        f'[superlink.{SUPERLINK}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    env = flower_env(program, home) | {
        **({"RAY_TMPDIR": str(scratch)} if len(str(scratch)) <= _LONGEST_RAY_FOLDER else {}),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    command = [str(Path(program).with_name("flower-superlink")), "--insecure", "--simulation"]
    command += ["--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--database", str(home / "state.db")]
    process = start_process(command, env, scratch, scratch / "superlink.log")
    try:
        await_superlink(port, process)
        yield env
    finally:
        end_processes([process], scratch)
