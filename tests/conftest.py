"""Fixtures shared by every test."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the first case of every slow test with several in the default run, but for real data, Ray and browsers."""
    seen = set()
    for item in items:
        test, _, case = item.nodeid.partition("[")
        first = bool(case) and test not in seen and not any(map(item.get_closest_marker, ("shared", "ray", "browser")))
        if first and item.get_closest_marker("slow"):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
        seen.add(test)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _log_as_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what command lines do to the log, and libraries that configure all logging there is."""
    logger = logging.getLogger("fedlp")
    for name, value in {"handlers": [], "propagate": True, "disabled": False}.items():
        monkeypatch.setattr(logger, name, value)
    logger.setLevel(logging.WARNING)  # whatever Hydra has made of the root's


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the documents, built as ``make docs`` builds them; whatever that says fails the test."""
    pytest.importorskip("mkdocs", reason="needs fedlp[docs]")
    if not (ROOT / "experiments").is_dir():
        pytest.skip("a source distribution has no experiments")
    folder = tmp_path_factory.mktemp("documents") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (done.stdout + done.stderr).strip()
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data sets and models: ``FEDLP_SHARED``, or ``shared`` beside the checkout."""
    folder = Path(os.environ.get("FEDLP_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data sets are not at {folder}; set FEDLP_SHARED to their folder")
    return folder
