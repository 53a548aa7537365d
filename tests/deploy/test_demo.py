"""``fedlp-deploy-demo`` end to end, and stopped half-way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fedlp.simulation.flower_process import processes_in
from tests.integration.running import TINY, command, execute, interruptible, read

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]
PATIENCE_S = 900


def test_the_deployed_model_is_the_local_engines_and_the_wire_agrees_with_the_records(tmp_path: Path) -> None:
    done = execute("fedlp-deploy-demo", "--out", "demo", cwd=tmp_path, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "model: the local engine's, bit for bit" in done.stdout
    run = read(tmp_path / "demo")
    assert [line["cohort"] for line in run.rounds] == [[0, 1, 2]] * 3
    assert run.failures == []
    *clients, whole = json.loads((tmp_path / "demo" / "wire.json").read_text())["traffic"]
    for way in ("up", "down"):
        sums = [sum(line["clients"][i][f"bytes_{way}"] for line in run.rounds) for i in range(3)]
        assert [part[f"recorded_{way}"] for part in clients] == sums
        assert whole[f"recorded_{way}"] == run.manifest["totals"][f"bytes_{way}"]
        assert all(part[f"wire_{way}"] > part[f"recorded_{way}"] for part in clients)
        framing = whole[f"wire_{way}"] / whole[f"recorded_{way}"] - 1
        assert framing < 0.2, f"{way}: {framing:.1%}, of which polling is more on a slow machine"


@pytest.mark.parametrize("word", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_being_stopped_ends_everything(folder: Path, tmp_path: Path, word: signal.Signals) -> None:
    tiny = (*TINY, "num_clients=2", "clients_per_round=2", "num_rounds=50")
    process = subprocess.Popen(
        interruptible(command("fedlp-deploy-demo", *tiny, "--out", "demo")),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = tmp_path / "demo" / "logs" / "supernode-0.log"
    deadline = time.monotonic() + PATIENCE_S
    while not log.is_file() or "Receiving: train message" not in log.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert len(processes_in(folder)) > 4, "SuperLink, two SuperNodes and what they started"
    os.killpg(process.pid, word)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + word
    assert "Traceback" not in errors


def test_bad_input_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = execute("fedlp-deploy-demo", "modell=x", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert list(tmp_path.iterdir()) == []
