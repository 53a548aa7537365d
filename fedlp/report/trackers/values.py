"""Numbers of a round for trackers: scalars, and distributions over clients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from fedlp.types import RoundRecord

_KEYS = ("client_id", "server_round")


def scalars(record: RoundRecord) -> dict[str, float]:
    """Return every finite number of a round: ``metrics/accuracy``, ``coverage/LAYER``, ``round/bytes_up``, ..."""
    found: dict[str, float] = {"round/failures": float(len(record.failures))}
    for f in fields(record):
        value = getattr(record, f.name)
        prefix = f"{f.name}/" if isinstance(value, Mapping) else "round/"
        for name, number in _numbers(value, "" if isinstance(value, Mapping) else f.name):
            found[f"{prefix}{name}"] = number
    return found


def distributions(record: RoundRecord) -> dict[str, list[float]]:
    """Return one finite number per client for every number of a client: ``clients/train_loss``, ..."""
    found: dict[str, list[float]] = {}
    for f in fields(record):
        entries = getattr(record, f.name)
        if f.name != "failures" and isinstance(entries, tuple | list):
            for entry in entries:
                if not isinstance(entry, int | float):
                    for name, number in _numbers(entry, ""):
                        found.setdefault(f"{f.name}/{name}", []).append(number)
    return found


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested plain values by dotted name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers in a value, with their paths; lists are left out."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{name}/{key}" if name else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool) and name not in _KEYS and math.isfinite(value):
        yield name, float(value)
