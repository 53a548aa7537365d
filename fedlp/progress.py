"""Live progress: one line that is rewritten in a terminal, a bar in a notebook, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO


def is_loss(name: str) -> bool:
    """Return whether a metric of a round is a loss: of the test set, of clients or of a tier."""
    return "loss" in name.split("_")


class Progress:
    """Progress of rounds: number, test metrics, mean staleness, uplink so far and remaining time.

    Parameters
    ----------
    num_rounds : int
        Rounds of the whole run.
    label : str
        Start of the line.
    done : int
        Rounds finished before, when a run is resumed.
    bar : bool
        Whether the line is a bar that carriage returns rewrite, as a notebook shows it.
    """

    def __init__(
        self, num_rounds: int, label: str, done: int = 0, stream: TextIO | None = None, bar: bool = False
    ) -> None:
        self._num_rounds = num_rounds
        self._label = label
        self._first = done
        self._started = time.monotonic()
        self._stream = sys.stderr if stream is None else stream
        self._bytes_up = 0
        self._metrics = ""
        self._open = False
        self._bar, self._longest = bar, 0

    def show(self, line: Mapping[str, Any]) -> None:
        """Show one finished round, given as its line of ``rounds.jsonl``."""
        done = line["server_round"]
        self._bytes_up += line["bytes_up"]
        metrics, failures = line["metrics"], line["failures"]
        shown = [name for name, value in metrics.items() if value is not None and name != "train_loss"]
        shown = sorted(shown, key=is_loss)  # the task's first metric
        self._metrics = f"{shown[0]} {metrics[shown[0]]:.4g}" if shown else self._metrics
        elapsed = time.monotonic() - self._started
        left = elapsed / (done - self._first) * (self._num_rounds - done)
        parts = [
            f"round {done}/{self._num_rounds}",
            self._metrics,
            _epsilon(line.get("privacy") or {}),
            _staleness(line.get("staleness") or {}),
            f"up {self._bytes_up / 1e6:.2f} MB",
            f"{len(failures)} failed" if failures else "",
            f"{_duration(left)} left" if done < self._num_rounds else f"done in {_duration(elapsed)}",
        ]
        if self._bar:
            parts.insert(0, _bar(done / self._num_rounds))
        self._print([part for part in parts if part], last=done == self._num_rounds)

    def close(self) -> None:
        """End the line of a run that ended before its last round."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False

    def _print(self, parts: list[str], last: bool) -> None:
        if self._bar:
            line = f"{self._label}: {'  '.join(parts)}"
            self._longest = max(self._longest, len(line))
            self._stream.write(f"\r{line:<{self._longest}}" + ("\n" if last else ""))
            self._open = not last
        elif self._stream.isatty():
            self._stream.write(f"\r{fit_line(self._label, parts, width_of(self._stream) - 1)}{ERASE_REST}")
            self._stream.write("\n" if last else "")
            self._open = not last
        else:
            self._stream.write(f"{self._label}: {'  '.join(parts)}\n")
        self._stream.flush()


def _bar(fraction: float) -> str:
    filled = round(_BAR * fraction)
    return f"[{'#' * filled}{'.' * (_BAR - filled)}]"


_BAR = 20  # characters
ERASE_REST = "\x1b[K"  # of a terminal's line


def width_of(stream: TextIO) -> int:
    """Return the columns of a terminal; 80 if unknown."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def fit_line(label: str, parts: list[str], width: int) -> str:
    """Return a line of at most ``width`` characters: a long label is cut, then parts after the second go, from left."""
    kept = list(parts)
    while True:
        rest = "  ".join(kept)
        room = width - len(rest) - 2
        if len(label) <= room:
            return f"{label}: {rest}"
        if room >= _SHORTEST_LABEL:
            return f"{label[: room - 1]}…: {rest}"
        if len(kept) <= _MOST_KEPT:
            return rest[:width]
        del kept[_MOST_KEPT]


_SHORTEST_LABEL, _MOST_KEPT = 8, 2


def _epsilon(privacy: Mapping[str, Any]) -> str:
    epsilon = privacy.get("epsilon")
    return "" if epsilon is None else f"epsilon {epsilon:.3g}"


def _staleness(steps: Mapping[Any, int]) -> str:
    return f"{sum(steps.values()) / len(steps):.2g} steps stale" if any(steps.values()) else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


class Counter:
    """Progress of a count: one line in a terminal, elsewhere a line every ten seconds.

    Parameters
    ----------
    label : str
        Heads the line.
    total : int
        Number of items.

    Use as a context manager.
    """

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self._label, self._total = label, total
        self._stream = sys.stderr if stream is None else stream
        self._done = 0
        self._started = self._shown = time.monotonic()
        self._every = 0.2 if self._stream.isatty() else 10.0

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown > self._started and self._stream.isatty():
            self._stream.write("\n")

    def advance(self, count: int = 1) -> None:
        """Count finished items."""
        self._done += count
        now = time.monotonic()
        if now - self._shown < self._every:
            return
        self._shown = now
        left = (now - self._started) / self._done * (self._total - self._done)
        line = f"{self._label}: {self._done:,} of {self._total:,}, {_duration(left)} left"
        self._stream.write(f"\r{line:<79}" if self._stream.isatty() else line + "\n")
        self._stream.flush()
