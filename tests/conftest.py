"""Fixtures shared by every test."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the first case of every slow test with several in the default run, unless it reads real data."""
    seen = set()
    for item in items:
        test, _, case = item.nodeid.partition("[")
        first = bool(case) and test not in seen and not item.get_closest_marker("shared")
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
def shared() -> Path:
    """Folder of real data sets and models: ``FEDLP_SHARED``, or ``shared`` beside the checkout."""
    folder = Path(os.environ.get("FEDLP_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data sets are not at {folder}; set FEDLP_SHARED to their folder")
    return folder
