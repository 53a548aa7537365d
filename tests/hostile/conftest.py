"""How many cases the fuzzers try (``FEDLP_HOSTILE_CASES``), and where figures go (``FEDLP_HOSTILE_FIGURES``)."""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

Figures = dict[str, dict[str, Any]]
"""Figures by kind of message or case: what was tried, how long it took."""


@pytest.fixture(scope="session")
def num_cases() -> int:
    return int(os.environ.get("FEDLP_HOSTILE_CASES", "700"))


@pytest.fixture(scope="session")
def figures() -> Iterator[Figures]:
    """Return a table to fill in; written at the end where a file is named for it."""
    found: Figures = {}
    started = time.monotonic()
    yield found
    if (path := os.environ.get("FEDLP_HOSTILE_FIGURES")) is not None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        about = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "wall_s": round(time.monotonic() - started, 1),
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_memory_mb": round(usage.ru_maxrss / 1e3),
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"about": about, "cases": found}, indent=1) + "\n")
