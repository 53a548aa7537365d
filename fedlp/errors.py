"""Errors with one-line messages for users.

Every user error is a :class:`FedLPError`; the command line prints its message as one line and exits with
code 2. A message names the fault, its place and the remedy.
"""

from __future__ import annotations


class FedLPError(Exception):
    """Base of every error that fedlp raises on purpose."""


class ConfigError(FedLPError):
    """Missing, misspelt or out-of-range config value."""


class DataError(FedLPError):
    """Data set or partition that cannot be provided as requested."""


class ProtocolError(FedLPError):
    """Violation of the protocol by a message: wrong shape, type, range, round or plan."""


class CalibrationError(FedLPError):
    """Calibration data too few or not finite for a layer's statistics."""


class AllocationError(FedLPError):
    """Budget that cannot be met, or sparsity plan that does not fit the model."""


class CheckpointError(FedLPError):
    """Missing or damaged checkpoint, or one of another run."""


class TrainingError(FedLPError):
    """Run that ended without a round that changed the model."""


class EvaluationError(FedLPError):
    """Failed evaluation of the global model in every worker; the run can be resumed from its last checkpoint."""


_NOISE = ("full_key:", "object_type=", "reference_type=", "To append to your config", "Config search path", "provider=")


def one_line(error: BaseException) -> str:
    """Return the message of another library's error as one line, without details of its internals."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(_NOISE)]
    return "; ".join(kept).replace(":; ", ": ") or type(error).__name__


def printable(text: object, most: int = 200) -> str:
    """Return the first non-blank line of an external text, cut to ``most`` characters; empty if there is none.

    Control and non-printable characters, such as escapes and changes of direction, become "?".
    """
    head = str(text).strip()[: most + 1]
    line = next(iter(head.splitlines()), "")
    shown = "".join(character if character.isprintable() else "?" for character in line[:most])
    return f"{shown}..." if len(line) > most else shown
