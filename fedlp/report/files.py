"""The files of a run directory, parsed but not yet checked field by field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedlp.errors import DataError
from fedlp.report.parse import mapping

PACKED = ".runs.jsonl.xz"


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Contents of one run directory.

    Attributes
    ----------
    path : Path
        Of the directory; errors name the files in it.
    config : str or None
        Text of ``config.yaml``; None without the file.
    manifest : JSON value
        Of ``manifest.json``, an object where it was read from a directory; None without the file.
    rounds : tuple of (int, JSON value)
        Line number and value of each line of ``rounds.jsonl``; a torn last line is left out. None without the file.
    """

    path: Path
    config: str | None
    manifest: Any
    rounds: tuple[tuple[int, Any], ...] | None

    def parsed_config(self) -> Any:
        """Return the value of ``config.yaml``; None without the file."""
        if self.config is None:
            return None
        try:
            return _load_yaml(self.config)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{self.path / 'config.yaml'}{f', line {mark.line + 1}' if mark else ''}"
            raise DataError(f"{where} is damaged: it is not YAML") from error


def _load_yaml(text: str) -> Any:
    """Return the value of YAML text; libyaml is ten times as fast, but refuses some text that PyYAML reads."""
    if hasattr(yaml, "CSafeLoader"):
        try:
            return yaml.load(text, Loader=yaml.CSafeLoader)
        except yaml.YAMLError:
            pass
    return yaml.safe_load(text)


def is_run(path: Path) -> bool:
    """Whether ``path`` looks like a run directory."""
    return (path / "manifest.json").is_file() or (path / "rounds.jsonl").is_file()


def is_packed(path: Path) -> bool:
    """Whether ``path`` is a file of packed runs, by its name."""
    return path.name.endswith(PACKED) and path.is_file()


def natural(text: str) -> list[tuple[int, str]]:
    """Return a sort key in which 2 comes before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", text)]


def run_sources(path: Path) -> Iterator[Path]:
    """Yield every run directory and packed file at or below ``path``, in natural order; each folder is searched once.

    Raises
    ------
    DataError
        If a folder cannot be read.
    """
    yield from _sources(path, set())


def _sources(path: Path, seen: set[Path]) -> Iterator[Path]:
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    try:
        if is_packed(path) or is_run(path):
            yield path
            return
        children = [child for child in path.iterdir() if not child.name.startswith(".")]
        children = [child for child in children if child.is_dir() or is_packed(child)]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    for child in sorted(children, key=lambda child: natural(child.name)):
        yield from _sources(child, seen)


def read_files(path: Path) -> RunFiles:
    """Read one run directory.

    Raises
    ------
    DataError
        If ``path`` is no run directory, or a file in it is not UTF-8 or no JSON; names the file and the line.
    """
    if not is_run(path):
        raise DataError(f"{path} is not a run directory: it holds neither manifest.json nor rounds.jsonl")
    return RunFiles(path, _read_text(path / "config.yaml"), _read_manifest(path / "manifest.json"), _read_lines(path))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _read_text(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged: it is not UTF-8") from error


def _read_manifest(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        manifest = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{line} is damaged: it is not JSON") from error
    return mapping(manifest, str(path))


def _read_lines(folder: Path) -> tuple[tuple[int, Any], ...] | None:
    path = folder / "rounds.jsonl"
    if not path.is_file():
        return None
    lines = _read_bytes(path).split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number} is damaged: it is not JSON") from error
    return tuple(found)
