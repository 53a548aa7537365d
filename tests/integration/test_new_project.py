"""``fedlp new DIR`` writes a project that runs and whose test passes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.integration.running import Call


@pytest.mark.slow
def test_a_new_project_passes_its_own_test(tmp_path: Path, call: Call) -> None:
    code, out, _ = call("new", "mine")
    assert code == 0
    folder = tmp_path / "mine"
    assert all(name in out for name in ("model.py", "data.py", "test_project.py", "conf/experiment/run.yaml"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("words", [(), ("a", "b"), ("a=b",)])
def test_new_asks_for_one_folder(words: tuple[str, ...], call: Call) -> None:
    code, _, error = call("new", *words)
    assert (code, error.count("\n")) == (2, 1)
    assert "fedlp new my_project" in error


def test_new_overwrites_nothing(tmp_path: Path, call: Call) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    code, _, error = call("new", "mine")
    assert code == 2
    assert "mine is not empty" in error
