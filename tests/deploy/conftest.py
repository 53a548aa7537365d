"""Fixtures of the deployment tests: a temporary folder whose processes and files must be gone at the end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlp.simulation.flower_process import processes_in


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the test a temporary folder of its own, and see that it leaves neither files nor processes there."""
    path = Path(tempfile.mkdtemp(prefix="deploy-"))
    monkeypatch.setenv("TMPDIR", str(path))
    yield path
    assert processes_in(path) == []
    assert list(path.glob("fedlp-*")) == []
    shutil.rmtree(path)
