"""Read run directories: the only door by which files come into a report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedlp.errors import DataError
from fedlp.report.parse import COUNTERS, is_count, mapping, numbers, only_numbers, round_record
from fedlp.types import RoundRecord

TOTALS = (*COUNTERS, "failures", "rounds", "contacts")
_COSTS = ("totals", "expected", "expected_totals")


@dataclass(frozen=True, slots=True)
class Run:
    """What one run directory says.

    Attributes
    ----------
    config : mapping
        The resolved config, nested as in ``config.yaml``.
    rounds : tuple of RoundRecord
        By ascending ``server_round``; round 0, where there is one, holds the initial model's metrics.
    manifest : mapping
        ``manifest.json``; empty where the run has not written it.
    """

    path: Path
    config: Mapping[str, Any]
    rounds: tuple[RoundRecord, ...]
    manifest: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])

    @property
    def num_rounds(self) -> int:
        """How many rounds the run was asked for."""
        return int(self.config["num_rounds"])

    @property
    def last_round(self) -> int:
        """The last round on record; 0 where none was trained."""
        return self.rounds[-1].server_round if self.rounds else 0

    @property
    def dry(self) -> bool:
        """Whether this is a dry run: it holds what is expected, nothing was measured."""
        return bool(self.config.get("dry_run"))

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        return not self.dry and (bool(self.final_metrics) or 0 < self.num_rounds <= self.last_round)

    @property
    def final_metrics(self) -> Mapping[str, float]:
        """Metrics of the final model as the manifest has them; empty before the end."""
        return self.manifest.get("final_metrics") or {}

    @property
    def expected(self) -> Mapping[str, float]:
        """What one client was predicted to cost in one round; empty where nothing was."""
        return self.manifest.get("expected") or {}

    @property
    def expected_totals(self) -> Mapping[str, float]:
        """What the whole run was predicted to cost if no client fails; empty where that is unknown."""
        known, cohort = self.manifest.get("expected_totals"), self.config.get("clients_per_round")
        if known or not isinstance(cohort, int):
            return known or {}
        per_client = {name: self.expected.get(f"{name}_per_client") for name in ("bytes_up", "bytes_down")}
        return {name: value * cohort * self.num_rounds for name, value in per_client.items() if value is not None}

    @property
    def totals(self) -> dict[str, float]:
        """Sums over the recorded rounds of every counter, of failures, rounds trained and clients asked (``contacts``).

        A run that has lost its ``rounds.jsonl`` gives its manifest's totals, with 0 for what those do not name.
        """
        if not self.rounds and not self.dry:
            return {name: self.manifest.get("totals", {}).get(name, 0.0) for name in TOTALS}
        sums = [sum(getattr(record, name) for record in self.rounds) for name in COUNTERS]
        failures = sum(len(record.failures) for record in self.rounds)
        trained = sum(record.server_round > 0 for record in self.rounds)
        contacts = sum(len(record.cohort) for record in self.rounds)
        return dict(zip(TOTALS, map(float, (*sums, failures, trained, contacts)), strict=True))


def load_run(path: Path) -> Run:
    """Read one run directory.

    A torn last line of ``rounds.jsonl`` (the run was stopped while writing) is left out; of a round recorded twice
    (the run was resumed) the later line holds.

    Raises
    ------
    DataError
        If ``path`` is no run directory, or a file in it is damaged; names the file and, where there is one, the line.
    """
    if not is_run(path):
        raise DataError(f"{path} is not a run directory: it holds neither manifest.json nor rounds.jsonl")
    manifest = _read_manifest(path / "manifest.json")
    source = path / "config.yaml"
    config = _read_yaml(source) if source.is_file() else None
    if manifest.get("config") is not None:  # a resumed run may have more rounds than it had at first
        source, config = path / "manifest.json", manifest["config"]
    if not isinstance(config, dict):
        raise DataError(f"{source} holds no config: a run directory needs config.yaml, or a manifest.json with one")
    for name in ("seed", "num_rounds"):
        if not is_count(config.get(name)):
            raise DataError(f"{source}: {name} is {config.get(name)!r}, not a whole number; the config is damaged")
    return Run(path, config, _read_rounds(path / "rounds.jsonl"), manifest)


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Read every run in ``paths``, each a run directory or a folder of them at any depth.

    Returns
    -------
    list of Run
        In the order of ``paths``, folders in natural order (2 before 10); a directory met twice is read once.

    Raises
    ------
    DataError
        If a path does not exist or holds no run, or a run is damaged.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise DataError(f"there is no folder {path}")
        folders = list(_run_folders(path, set()))
        if not folders:
            raise DataError(f"no run in {path}: a run directory holds manifest.json or rounds.jsonl")
        for folder in folders:
            if folder.resolve() not in runs:
                runs[folder.resolve()] = load_run(folder)
    return list(runs.values())


def is_run(path: Path) -> bool:
    """Whether ``path`` looks like a run directory."""
    return (path / "manifest.json").is_file() or (path / "rounds.jsonl").is_file()


def _run_folders(path: Path, seen: set[Path]) -> Iterator[Path]:
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    try:
        if is_run(path):
            yield path
            return
        children = [child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    for child in sorted(children, key=_natural):
        yield from _run_folders(child, seen)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(_read_bytes(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise DataError(f"{path}{f', line {mark.line + 1}' if mark else ''} is damaged: it is not YAML") from error


def _read_manifest(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{line} is damaged: it is not JSON") from error
    where = str(path)
    manifest = mapping(manifest, where)
    for name in ("config", "versions", "final_metrics", *_COSTS):
        if manifest.get(name) is not None:
            mapping(manifest[name], f"{where}: {name}")
    final_metrics = numbers(manifest.get("final_metrics") or {}, f"{where}: final_metrics")
    costs = {name: only_numbers(manifest.get(name) or {}) for name in _COSTS}
    return {**manifest, **costs, "final_metrics": final_metrics}


def _read_rounds(path: Path) -> tuple[RoundRecord, ...]:
    if not path.is_file():
        return ()
    lines = _read_bytes(path).split(b"\n")
    records: dict[int, RoundRecord] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise DataError(f"{where} is damaged: it is not JSON") from error
        record = round_record(mapping(entry, where), where)
        records[record.server_round] = record
    return tuple(records[server_round] for server_round in sorted(records))
