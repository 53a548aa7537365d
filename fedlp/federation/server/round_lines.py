"""Lines of ``rounds.jsonl``, one per round: read one at a time, since long runs have gigabytes of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlp.errors import CheckpointError

_SUMS = ("bytes_up", "bytes_down", "params_up", "params_down", "macs", "wall_time_s")
_KEYS = {"server_round", "failures", "metrics", *_SUMS}


def each_line(path: Path, strict: bool = True) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the rounds of a file, each with the byte at which it ends; a torn last line of a killed run is left out.

    Parameters
    ----------
    strict : bool
        Whether a damaged line before the last is an error; else only the lines before it are yielded.

    Raises
    ------
    CheckpointError
        For a damaged line; names it.
    """
    if not path.is_file():
        return
    end = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            end += len(raw)
            try:
                if raw != b"\n":
                    yield _read_line(raw), end
            except ValueError as error:
                if strict and raw.endswith(b"\n"):
                    raise CheckpointError(f"{path}, line {number}: {error}; restore the file") from error
                return


def keep_lines(path: Path, end: int) -> None:
    """Cut a file behind the line that ends at a byte."""
    with path.open("a+b") as file:
        file.truncate(end)
        file.seek(max(0, end - 1))
        if end and file.read() != b"\n":  # the last line of a killed run, whole but for its end
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def add_up(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the totals of all rounds, and the metrics of the last one; CheckpointError for a damaged line."""
    columns: dict[str, list[Any]] = {key: [] for key in (*_SUMS, "rounds", "failures", "good_rounds")}
    final: dict[str, Any] = {}
    for line, _ in each_line(path):
        counts = {"rounds": 1, "failures": len(line["failures"]), "good_rounds": _is_good(line)}
        for key, column in columns.items():
            column.append(counts[key] if key in counts else line[key])
        final = line["metrics"]
    return {key: sum(column) for key, column in columns.items()}, final


def json_line(value: Mapping[str, Any]) -> bytes:
    """Return a line of JSON."""
    return json.dumps(plain(value)).encode() + b"\n"


def plain(value: Any) -> Any:
    """Return a value with non-finite numbers as None, valid JSON."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_line(line: bytes) -> dict[str, Any]:
    """Return one round; ValueError for an invalid line."""
    value = json.loads(line)
    if not isinstance(value, dict) or not value.keys() >= _KEYS:
        raise ValueError("not the record of a round")
    for key in _SUMS:
        if not isinstance(value[key], int | float):
            raise ValueError(f"{key} is {json.dumps(value[key])[:40]}, not a number")
    return value


def _is_good(line: Mapping[str, Any]) -> bool:
    """Return whether a round had a good update that reached the model, or was to have none and is noise alone."""
    if "clipping_norm" in line.get("privacy", ()) and not line["failures"]:
        return True
    trained = {cost["client_id"] for cost in line.get("clients", ()) if cost["num_examples"]}
    good = trained - {failure["client_id"] for failure in line["failures"]}
    was_kept = any(line.get("coverage", {}).values()) or not line["params_up"]  # a layer draw may take no layer
    return bool(good) and was_kept
