"""Threads and cores of this process."""

from __future__ import annotations

import os

from fedlp.models.threads import one_thread

__all__ = ["count_cores", "one_thread"]


def count_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
