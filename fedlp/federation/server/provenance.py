"""Provenance of a run: date, git commit of the project, host and processor."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

_GIT_TIMEOUT_S = 5.0


def provenance(project: Path) -> dict[str, Any]:
    """Return the date (ISO 8601, with the offset from UTC), host, processor, cores, and commit of a project's folder.

    Returns
    -------
    dict
        ``commit`` ends with "+" where tracked files were changed; it is None outside of git.
    """
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _commit(project),
        "host": platform.node(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
    }


def _commit(folder: Path) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    head = _ask(program, folder, "rev-parse", "HEAD")
    if not head:
        return None
    return head + ("+" if _ask(program, folder, "status", "--porcelain", "--untracked-files=no") else "")


def _ask(program: str, folder: Path, *words: str) -> str:
    """Return git's output; empty if it fails."""
    try:
        done = subprocess.run(
            [program, "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    """Return the processor's name; empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return next(iter(names), "") or platform.processor() or platform.machine()
