"""Many run directories in one file, to commit or to send: ``NAME.runs.jsonl.xz``.

The file is UTF-8 text compressed with xz, one JSON object a line and run::

    {"run": "fedavg/seed-0", "config.yaml": "seed: 0...", "manifest.json": {...}, "rounds.jsonl": [{...}, ...]}

``run`` is the directory's path below the packed folder. A file that the directory does not hold is null. Runs are in
natural order of their names, and equal runs give equal bytes with one version of liblzma. ``fedlp-report`` reads such a
file as it reads the folder.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlp.errors import DataError
from fedlp.report.files import PACKED, RunFiles, is_packed, natural, read_files, run_sources

_CONFIG, _MANIFEST, _ROUNDS = "config.yaml", "manifest.json", "rounds.jsonl"
_NOT_IN_NAMES = {"", ".", ".."}


def pack_runs(folder: Path, file: Path) -> int:
    """Pack every run directory below ``folder`` into ``file``; return their number.

    Model weights and checkpoints are left out: a packed run can be reported on, not resumed.

    Raises
    ------
    DataError
        If there is no run, a file is not JSON, or ``file`` has another suffix than ``.runs.jsonl.xz``.
    """
    paths = [path for path in run_sources(folder) if not is_packed(path)]
    runs = {_name(path, folder): read_files(path) for path in paths}
    if not runs:
        raise DataError(f"no run in {folder}: a run directory holds manifest.json or rounds.jsonl")
    write_packed(file, runs)
    return len(runs)


def unpack_runs(file: Path, folder: Path) -> int:
    """Write every run of a packed file as a run directory below ``folder``; return their number."""
    runs = read_packed(file)
    for name, files in runs.items():
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        if files.config is not None:
            (path / _CONFIG).write_bytes(files.config.encode())
        if files.manifest is not None:
            (path / _MANIFEST).write_bytes(json.dumps(files.manifest, indent=2).encode() + b"\n")
        if files.rounds is not None:
            (path / _ROUNDS).write_bytes("".join(json.dumps(entry) + "\n" for _, entry in files.rounds).encode())
    return len(runs)


def write_packed(file: Path, runs: Mapping[str, RunFiles]) -> None:
    """Write runs by name into ``file``, all or nothing.

    Raises
    ------
    DataError
        If a name is not a relative path, or ``file`` has another suffix than ``.runs.jsonl.xz``.
    OSError
        If ``file`` cannot be written.
    """
    if not file.name.endswith(PACKED):
        raise DataError(f"{file}: a file of packed runs is named NAME{PACKED}")
    lines = []
    for name in sorted(runs, key=lambda name: [natural(part) for part in name.split("/")]):
        _check_name(name, str(file))
        files = runs[name]
        rounds = None if files.rounds is None else [entry for _, entry in files.rounds]
        values = {"run": name, _CONFIG: files.config, _MANIFEST: files.manifest, _ROUNDS: rounds}
        lines.append(json.dumps(values, separators=(",", ":")) + "\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    os.replace(part, file)


def read_packed(file: Path) -> dict[str, RunFiles]:
    """Read a packed file: ``{name: files}``; the path of a run is ``file/name``.

    Raises
    ------
    DataError
        If the file cannot be read or is damaged; names the file and, where there is one, the line.
    """
    runs: dict[str, RunFiles] = {}
    for number, line in _lines(file):
        where = f"{file}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is damaged: it is not JSON") from error
        name, files = _run_files(values, file, where)
        if name in runs:
            raise DataError(f"{where} is damaged: it repeats the run {name}")
        runs[name] = files
    if not runs:
        raise DataError(f"{file} is damaged: it holds no run")
    return runs


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with lzma.open(file, "rb") as stream:
            yield from enumerate(stream, start=1)
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{file} is damaged: it is not a whole xz file") from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def _run_files(values: Any, file: Path, where: str) -> tuple[str, RunFiles]:
    if not isinstance(values, dict):
        raise DataError(f"{where} is damaged: it holds {type(values).__name__} where an object belongs")
    for key in ("run", _CONFIG, _MANIFEST, _ROUNDS):
        if key not in values:
            raise DataError(f"{where} is damaged: it has no {key}")
    name, config, rounds = values["run"], values[_CONFIG], values[_ROUNDS]
    _check_name(name, where)
    if config is not None and not isinstance(config, str):
        raise DataError(f"{where} is damaged: {_CONFIG} is not text")
    if rounds is not None and not isinstance(rounds, list):
        raise DataError(f"{where} is damaged: {_ROUNDS} is not a list")
    numbered = None if rounds is None else tuple(enumerate(rounds, start=1))
    return name, RunFiles(file / name, config, values[_MANIFEST], numbered)


def _name(path: Path, folder: Path) -> str:
    return folder.resolve().name if path == folder else path.relative_to(folder).as_posix()


def _check_name(name: Any, where: str) -> None:
    """Refuse a name that would lead out of the folder that it is unpacked to."""
    parts = name.split("/") if isinstance(name, str) and name.isprintable() and "\\" not in name else [""]
    if any(part in _NOT_IN_NAMES for part in parts):
        raise DataError(f"{where}: the run's name is {name!r}, not a path below the packed folder")
