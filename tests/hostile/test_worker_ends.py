"""No process outlives a run, not even in the middle of a long step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.test_resume import members

LONG_STEPS = """
import signal, sys, time
from pathlib import Path
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.app import RecordDict
from fedlp.simulation.local import LocalGrid

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests
app = ClientApp()

@app.query("long")
def long(message, context):
    Path(sys.argv[1], str(context.node_config["partition-id"])).touch()
    matrix = torch.rand(1500, 1500)
    while True:  # products of a tenth of a second, in which Python's signals and threads must take their turn
        matrix = (matrix @ matrix).clamp_(0, 1)

way = sys.argv[2]
if way == "pipe":  # as where there is no prctl
    from fedlp.simulation import worker
    worker.sys = type("", (), {"platform": "darwin"})

def make_app():
    return app

if __name__ == "__main__":
    with LocalGrid(make_app, 2, 2, 1 << 16, start="spawn" if way == "spawn" else "fork") as grid:
        list(grid.stream([Message(RecordDict(), node, "query.long") for node in (1, 2)], float("inf")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("way", ["prctl", "pipe", "spawn"])
def test_workers_end_with_their_parent(number: signal.Signals, way: str, tmp_path: Path) -> None:
    script, seen = tmp_path / "script.py", tmp_path / "seen"
    script.write_text(LONG_STEPS)
    seen.mkdir()
    process = subprocess.Popen([sys.executable, str(script), str(seen), way], start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(seen.iterdir())) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)  # in the middle of a product
    assert len(members(process.pid)) == (4 if way == "spawn" else 3)  # spawned: Python's tracker of shared memory
    os.kill(process.pid, number)
    process.wait(timeout=10)
    deadline = time.monotonic() + 3
    while members(process.pid):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)
