"""Reader of run directories and packed runs, the only input of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlp.errors import DataError
from fedlp.report.files import PACKED, RunFiles, is_packed, read_files, run_sources
from fedlp.report.packed import read_packed
from fedlp.report.parse import COUNTERS, budgets, is_count, mapping, numbers, only_numbers, round_record
from fedlp.types import RoundRecord

TOTALS = (*COUNTERS, "failures", "rounds", "contacts")
_COSTS = ("totals", "expected", "expected_totals")


@dataclass(frozen=True, slots=True)
class Run:
    """Content of one run directory.

    Attributes
    ----------
    config : mapping
        The resolved config, nested as in ``config.yaml``.
    rounds : tuple of RoundRecord
        By ascending ``server_round``; round 0, where there is one, holds the initial model's metrics.
    manifest : mapping
        ``manifest.json``; empty if the run has not written it.
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
        """Configured number of rounds."""
        return int(self.config["num_rounds"])

    @property
    def last_round(self) -> int:
        """Last recorded round; 0 if none was trained."""
        return self.rounds[-1].server_round if self.rounds else 0

    @property
    def dry(self) -> bool:
        """Whether this is a dry run, with expected costs alone."""
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
    def budgets(self) -> Mapping[str, Mapping[str, Mapping[str, float]]]:
        """Limit and use of each limit of each tier; empty without budgets."""
        return self.manifest.get("budgets") or {}

    @property
    def expected(self) -> Mapping[str, float]:
        """Predicted cost of one client in one round; empty if unknown."""
        return self.manifest.get("expected") or {}

    @property
    def expected_totals(self) -> Mapping[str, float]:
        """Predicted cost of the whole run if no client fails; empty if unknown."""
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
    return _checked(read_files(path))


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Read every run in ``paths``: run directories, packed files, and folders of either at any depth.

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
        found = list(_sources(path))
        if not found:
            raise DataError(f"no run in {path}: a run directory holds manifest.json or rounds.jsonl")
        for source in found:
            if source.resolve() not in runs:
                packed = read_packed(source).values() if is_packed(source) else [read_files(source)]
                runs |= {files.path.resolve(): _checked(files) for files in packed}
    return list(runs.values())


def _sources(path: Path) -> Iterator[Path]:
    """Yield the run directories and packed files at or below ``path``."""
    if path.is_file() and not is_packed(path):
        raise DataError(f"{path} is neither a run directory nor a file of packed runs (*{PACKED})")
    if not path.exists():
        raise DataError(f"there is no folder {path}")
    yield from run_sources(path)


def _checked(files: RunFiles) -> Run:
    manifest = _checked_manifest(files.manifest, str(files.path / "manifest.json"))
    source, config = files.path / "config.yaml", files.parsed_config()
    if manifest.get("config") is not None:  # a resumed run may have more rounds than it had at first
        source, config = files.path / "manifest.json", manifest["config"]
    if not isinstance(config, dict):
        raise DataError(f"{source} holds no config: a run directory needs config.yaml, or a manifest.json with one")
    for name in ("seed", "num_rounds"):
        if not is_count(config.get(name)):
            raise DataError(f"{source}: {name} is {config.get(name)!r}, not a whole number; the config is damaged")
    records: dict[int, RoundRecord] = {}
    for number, entry in files.rounds or ():
        where = f"{files.path / 'rounds.jsonl'}, line {number}"
        record = round_record(mapping(entry, where), where)
        records[record.server_round] = record
    return Run(files.path, config, tuple(records[server_round] for server_round in sorted(records)), manifest)


def _checked_manifest(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    manifest = mapping(value, where)
    for name in ("config", "versions", "final_metrics", *_COSTS):
        if manifest.get(name) is not None:
            mapping(manifest[name], f"{where}: {name}")
    final_metrics = numbers(manifest.get("final_metrics") or {}, f"{where}: final_metrics")
    costs = {name: only_numbers(manifest.get(name) or {}) for name in _COSTS}
    used = budgets(manifest.get("budgets") or {}, f"{where}: budgets")
    return {**manifest, **costs, "budgets": used, "final_metrics": final_metrics}
