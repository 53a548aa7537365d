"""The same apps on Flower's simulation runtime: the same bytes, one line where a run fails, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedlp.simulation.flower_process import processes_in
from tests.integration.running import TINY, Finished, command, execute, interruptible, read

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]
Once = Callable[..., Finished]
CASE = (*TINY, "strategy=fedlp_hetero", "server_optimizer=momentum")
PATIENCE_S = 400


@pytest.fixture(autouse=True)
def _temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the run a temporary folder of its own, and see that it leaves neither files nor processes."""
    folder = Path(tempfile.mkdtemp(prefix="f"))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield
    assert processes_in(folder) == []
    assert list(folder.glob("fedlp-*")) == []
    shutil.rmtree(folder)


def test_a_run_gives_the_bytes_of_the_local_engine(once: Once, tmp_path: Path) -> None:
    done = execute("fedlp", *CASE, "simulation=flower", "hydra.run.dir=run", cwd=tmp_path, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[1].split()[1] for line in done.stderr.splitlines()] == ["1/2", "2/2"]
    ray, local = read(tmp_path / "run"), once(*CASE)
    assert ray.model == local.model
    assert ray.untimed == local.untimed
    heads = [sorted(path.relative_to(run.path) for path in run.path.glob("clients/*/*")) for run in (ray, local)]
    assert heads[0] == heads[1] != []


def test_secure_aggregation_gives_the_bytes_of_the_local_engine(once: Once, tmp_path: Path) -> None:
    case = (*TINY, "strategy=fedavg", "privacy=secagg", "fleet.dropout=0.2")
    done = execute("fedlp", *case, "simulation=flower", "hydra.run.dir=run", cwd=tmp_path, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    ray, local = read(tmp_path / "run"), once(*case)
    assert ray.model == local.model
    assert ray.untimed == local.untimed


def test_a_run_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    absent = ("dataset=cifar10", "dataset.root=/nonexistent", "dataset.download=false", "model=fedlp_cnn")
    done = execute("fedlp", *absent, "simulation=flower", "hydra.run.dir=run", cwd=tmp_path, timeout=PATIENCE_S)
    assert done.returncode == 2
    assert done.stderr.startswith("fedlp: cifar10: no folder /nonexistent; ")
    assert done.stderr.count("\n") == 1
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_that_is_stopped_goes_on_on_the_other_engine(once: Once, tmp_path: Path) -> None:
    case = (*CASE, "num_rounds=40")
    process = subprocess.Popen(
        interruptible(command("fedlp", *case, "simulation=flower", "hydra.run.dir=run")),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    rounds = tmp_path / "run" / "rounds.jsonl"
    deadline = time.monotonic() + PATIENCE_S
    while not rounds.is_file() or rounds.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert rounds.read_bytes().count(b"\n") < 40, "the run was over before the signal came"
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == f"fedlp: stopped; go on with: fedlp resume={tmp_path / 'run'}"
    resumed = execute("fedlp", "resume=run", "simulation=local", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert read(tmp_path / "run").model == once(*case).model
    assert read(tmp_path / "run").untimed == once(*case).untimed
