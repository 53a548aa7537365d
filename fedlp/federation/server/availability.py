"""Availability of clients in a round, and drop-outs in mid-round.

Draws are keyed on round and client, so that a resumed run has the same ones. A trace is a CSV file with the columns
``client``, ``from`` and ``to``: the first and last round, both included, of a stretch of availability; an
empty ``to`` has no end. A client without a row is never available. With a duration of a round, ``from`` and ``to`` are
seconds since the start of the run: a client is available in the rounds that begin in one of its stretches. On a virtual
clock they are seconds of that clock, and a client leaves at the end of its stretch.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlp.errors import DataError, one_line
from fedlp.rng import Stream, generator, generators

Stretches = Mapping[int, tuple[tuple[float, float], ...]]
"""First and last round, or second, of each stretch of availability, by client id."""

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
        A trace in rounds.
    seconds : mapping, optional
        A trace in seconds of the virtual clock.
    """

    seed: int = 0
    probability: float = 1.0
    stretches: Stretches | None = None
    seconds: Stretches | None = None

    def present(self, server_round: int, client_ids: Sequence[int]) -> Sequence[int]:
        """Return the available ones of some clients in a round, in their order; the very sequence if all always are."""
        if self.stretches is None and self.probability >= 1:
            return client_ids
        if self.stretches is None:
            draws = generators(self.seed, Stream.AVAILABILITY, server_round, last=client_ids)
            return [i for i, rng in zip(client_ids, draws, strict=True) if rng.random() < self.probability]
        return [i for i in client_ids if any(a <= server_round <= b for a, b in self.stretches.get(i, ()))]

    def present_at(self, now: float, server_round: int, client_ids: Sequence[int]) -> Sequence[int]:
        """Return the available ones of some clients at a second of the virtual clock, in their order."""
        if self.seconds is None:
            return self.present(server_round, client_ids)
        return [client_id for client_id in client_ids if self.leaves_at(client_id, now) > now]

    def leaves_at(self, client_id: int, now: float) -> float:
        """Return the second at which an available client leaves; ``now`` if it is not there, infinity if it stays."""
        if self.seconds is None:
            return math.inf
        end = now
        for first, last in sorted(self.seconds.get(client_id, ())):
            if first <= end < last:
                end = last
        return end

    def next_arrival(self, now: float) -> float:
        """Return the first second after ``now`` at which a stretch begins; infinity if none does."""
        begins = (first for stretches in (self.seconds or {}).values() for first, _ in stretches if first > now)
        return min(begins, default=math.inf)


def make_availability(
    setting: str | float | None, seed: int, round_s: float | None = None, is_virtual: bool = False
) -> Availability:
    """Return the availability of a config: a trace file, a probability, or all clients always.

    Parameters
    ----------
    round_s : float, optional
        Duration of a round in seconds, > 0, for a trace in seconds.
    is_virtual : bool
        Whether a trace is in seconds of the virtual clock.
    """
    if isinstance(setting, str) and is_virtual:
        return Availability(seed, seconds=read_trace(Path(setting).expanduser(), in_seconds=True))
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


def read_trace(path: Path, round_s: float | None = None, in_seconds: bool = False) -> Stretches:
    """Return the stretches of a trace file: in rounds, also of a trace in seconds, or as they are with ``in_seconds``.

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
    found: dict[int, list[tuple[float, float]]] = {}
    for number, row in enumerate(rows, start=2):
        if missing := [name for name in _COLUMNS if name not in row]:
            raise DataError(f"{path} has no column {missing[0]}; a trace has client, from, to (rounds)")
        client_id, first, last = _read_row(
            row, f"{path}, line {number}", float if in_seconds or round_s is not None else int
        )
        if round_s is not None:
            start = first / round_s
            first = 1.0 + math.ceil(start) if start < math.inf else math.inf
            last = last if last == math.inf else 1 + last // round_s
        found.setdefault(client_id, []).append((first, last))
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
