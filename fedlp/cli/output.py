"""Standard output after its reader has closed it, and warnings under ``PYTHONWARNINGS=error``."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from typing import cast


def say(text: str) -> None:
    """Print the last words of a program."""
    with suppress(BrokenPipeError):
        print(text)
    close_output()


def close_output() -> None:
    """Flush both streams; output after the reader has closed the pipe (``| head``) is discarded."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def forgive_warnings() -> None:
    """Undo ``PYTHONWARNINGS=error`` for this program, since third-party packages warn at import."""
    if not any(option.startswith("error") for option in sys.warnoptions):
        return
    os.environ.pop("PYTHONWARNINGS", None)  # also for processes that are started
    kept = [entry for entry in warnings.filters if entry[0] != "error"]
    warnings.resetwarnings()
    cast(list[object], warnings.filters).extend(kept)
