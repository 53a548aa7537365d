"""Outcome of a ServerApp in another process, from the file that it leaves."""

from __future__ import annotations

import json
from pathlib import Path

from fedlp.errors import FedLPError


def read_outcome(path: Path) -> None:
    """Raise the error that ended a run of the ServerApp, from the file named as ``outcome`` in its run config.

    Raises
    ------
    FedLPError
        With the reason of the end.
    RuntimeError
        With the traceback of any other error.
    """
    outcome: dict[str, str] = json.loads(path.read_text())
    if "reason" in outcome:
        raise FedLPError(outcome["reason"])
    if "traceback" in outcome:
        raise RuntimeError(f"the ServerApp failed on Flower:\n{outcome['traceback']}")
