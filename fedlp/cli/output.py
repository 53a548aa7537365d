"""Standard output whose reader may have gone, and warnings that a user has turned into errors."""

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
    """Flush both streams; where the reader has gone, as ``| head`` does, the rest goes nowhere, without a word."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def forgive_warnings() -> None:
    """Take back ``PYTHONWARNINGS=error`` for this program: other packages warn of each other while they load."""
    if not any(option.startswith("error") for option in sys.warnoptions):
        return
    os.environ.pop("PYTHONWARNINGS", None)  # also for processes that are started
    kept = [entry for entry in warnings.filters if entry[0] != "error"]
    warnings.resetwarnings()
    cast(list[object], warnings.filters).extend(kept)
