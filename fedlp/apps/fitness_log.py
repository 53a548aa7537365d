"""Measured values of a search by key, in a file that a stopped search reads again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedlp.errors import ConfigError, one_line


class FitnessLog:
    """Values on record, one JSON line each.

    Raises
    ------
    ConfigError
        If the file is damaged, but for a last line that was being written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.known: dict[str, float] = {}
        if file.exists():
            *whole, torn = file.read_text(encoding="utf-8").split("\n")
            try:
                self.known = {entry["key"]: float(entry["fitness"]) for entry in map(json.loads, whole)}
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"{file} is damaged ({one_line(error)}); remove it to search anew") from error
            if torn:
                file.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")

    def add(self, values: Mapping[str, float]) -> None:
        """Put values on record."""
        with self._file.open("a", encoding="utf-8") as out:
            for key, value in values.items():
                self.known[key] = value
                out.write(json.dumps({"key": key, "fitness": value}) + "\n")
