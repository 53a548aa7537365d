"""Availability of clients in a round, and drop-outs in mid-round.

Draws are keyed on round and client, so that a resumed run has the same ones. A trace is a CSV file with the columns
``client``, ``from`` and ``to``: the first and last round, both included, of a stretch of availability; an
empty ``to`` has no end. A client without a row is never available. With a duration of a round, ``from`` and ``to`` are
seconds since the start of the run: a client is available in the rounds that begin in one of its stretches.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlp.errors import DataError, one_line
from fedlp.rng import Stream, generator

Stretches = Mapping[int, tuple[tuple[int, float], ...]]
"""First and last round of each stretch of availability, by client id."""

_COLUMNS = ("client", "from", "to")


@dataclass(frozen=True, slots=True)
class Availability:
    """Availability of clients by round.

    Attributes
    ----------
    seed : int
        Seed of every draw, >= 0.
    probability : float
        Probability that a client is available in a round, in [0, 1]; not read if there is a trace.
    stretches : mapping, optional
        A trace.
    """

    seed: int = 0
    probability: float = 1.0
    stretches: Stretches | None = None

    def present(self, server_round: int, client_ids: Iterable[int]) -> list[int]:
        """Return the available ones of some clients in a round, in their order."""
        if self.stretches is None and self.probability >= 1:
            return list(client_ids)
        return [client_id for client_id in client_ids if self._is_there(server_round, client_id)]

    def _is_there(self, server_round: int, client_id: int) -> bool:
        if self.stretches is not None:
            return any(first <= server_round <= last for first, last in self.stretches.get(client_id, ()))
        if self.probability >= 1:
            return True
        return bool(generator(self.seed, Stream.AVAILABILITY, server_round, client_id).random() < self.probability)


def make_availability(setting: str | float | None, seed: int, round_s: float | None = None) -> Availability:
    """Return the availability of a config: a trace file, a probability, or all clients always.

    Parameters
    ----------
    round_s : float, optional
        Duration of a round in seconds, > 0, for a trace in seconds.
    """
    if isinstance(setting, str):
        return Availability(seed, stretches=read_trace(Path(setting).expanduser(), round_s))
    return Availability(seed, 1.0 if setting is None else float(setting))


def draw_dropouts(seed: int, server_round: int, cohort: Iterable[int], probability: float) -> frozenset[int]:
    """Return the clients of a cohort that drop out after receiving their sub-model."""
    if not probability:
        return frozenset()
    return frozenset(
        client_id
        for client_id in cohort
        if generator(seed, Stream.DROPOUT, server_round, client_id).random() < probability
    )


def read_trace(path: Path, round_s: float | None = None) -> Stretches:
    """Return the stretches of a trace file.

    Raises
    ------
    DataError
        If the file cannot be read, lacks a column, or has an invalid line; names it.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"fleet.availability={path} cannot be read ({one_line(error)})") from error
    found: dict[int, list[tuple[int, float]]] = {}
    for number, row in enumerate(rows, start=2):
        if missing := [name for name in _COLUMNS if name not in row]:
            raise DataError(f"{path} has no column {missing[0]}; a trace has client, from, to (rounds)")
        client_id, first, last = _read_row(row, f"{path}, line {number}", int if round_s is None else float)
        if round_s is not None:
            first, last = 1 + math.ceil(first / round_s), last if last == math.inf else 1 + last // round_s
        found.setdefault(client_id, []).append((int(first), last))
    if not found:
        raise DataError(f"{path} holds no stretch; a trace has lines of client, from, to (rounds)")
    return {client_id: tuple(stretches) for client_id, stretches in found.items()}


def _read_row(row: Mapping[str, str | None], where: str, read: Callable[[str], float]) -> tuple[int, float, float]:
    """Return a client and the beginning and end of a stretch, in rounds or seconds."""
    try:
        client_id, first = int(row["client"] or ""), read(row["from"] or "")
        last = read(end) if (end := (row["to"] or "").strip()) else math.inf
    except ValueError as error:
        kind = "whole numbers" if read is int else "numbers, client a whole one"
        raise DataError(f"{where}: client, from and to must be {kind} ({error})") from error
    if client_id < 0 or not 0 <= first <= last or first == math.inf:
        raise DataError(f"{where}: client {client_id} is there from {first} to {last}, which is no stretch")
    return client_id, first, last
