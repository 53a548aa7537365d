"""What can go wrong, in the words a user reads.

Every error a user can cause is a :class:`FedLPError`; the command line prints its message as one line and exits with
code 2. A message says what was wrong, where, and what to do.
"""

from __future__ import annotations


class FedLPError(Exception):
    """Base of every error that fedlp raises on purpose."""


class ConfigError(FedLPError):
    """A config value is missing, misspelt or out of range."""


class DataError(FedLPError):
    """A data set or a partition cannot be had as asked."""


class ProtocolError(FedLPError):
    """A message breaks the protocol: wrong shape, type, range, round or plan."""


class CalibrationError(FedLPError):
    """Calibration data are too few or not finite, so that a layer's statistics cannot be had."""


class AllocationError(FedLPError):
    """A budget cannot be met, or a sparsity plan does not fit the model."""


class CheckpointError(FedLPError):
    """A checkpoint is missing, damaged or of another run."""


class TrainingError(FedLPError):
    """A run ended, but no round changed the model."""


class EvaluationError(FedLPError):
    """The global model could not be evaluated, wherever it was tried; the run can go on from its last checkpoint."""


_NOISE = ("full_key:", "object_type=", "reference_type=", "To append to your config", "Config search path", "provider=")


def one_line(error: BaseException) -> str:
    """Return what an error of another library says, in one line, without what only its authors can use."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(_NOISE)]
    return "; ".join(kept).replace(":; ", ": ") or type(error).__name__


def printable(text: object, most: int = 200) -> str:
    """Return the first line of a text from outside, cut to ``most`` characters; empty where all of it is blank.

    Characters that a terminal may obey or cannot show, such as escapes and changes of direction, become "?".
    """
    head = str(text).strip()[: most + 1]
    line = next(iter(head.splitlines()), "")
    shown = "".join(character if character.isprintable() else "?" for character in line[:most])
    return f"{shown}..." if len(line) > most else shown
