"""Run directory: config, rounds, manifest, model, checkpoints."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save

from fedlp.errors import CheckpointError, ConfigError, FedLPError, one_line
from fedlp.federation.server.checkpoint import (
    ServerState,
    checkpoint_rounds,
    discard_checkpoint,
    read_checkpoint,
    save_checkpoint,
    sync_folder,
    write_atomically,
)
from fedlp.federation.server.provenance import provenance
from fedlp.types import Budget, RoundRecord

if sys.platform != "win32":  # which locks no folders: there a run is not guarded from a second one
    import fcntl

log = logging.getLogger("fedlp")

_PACKAGES = ("fedlp", "flwr", "torch", "torchvision", "transformers", "hydra-core", "numpy")
_RESULTS = ("manifest.json", "model.safetensors", "model-best.safetensors")
_TOTALS = ("bytes_up", "bytes_down", "params_up", "params_down", "macs", "wall_time_s")
_OPTIONAL = ("evaluations", "absent", "phases", "privacy", "clipped", "simulated")  # left out where empty
_KEYS = {"server_round", "failures", "metrics", *_TOTALS}


class RunDirectory:
    """Folder of one run: ``config.yaml rounds.jsonl manifest.json model.safetensors checkpoint/ clients/``.

    With devices' own budgets, also ``budgets.json``: client id -> each device's last limits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clients = path / "clients"
        self._checkpoints = path / "checkpoint"
        self._rounds = path / "rounds.jsonl"
        self._budgets = path / "budgets.json"

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Lock the folder against other processes; ConfigError if one holds it. Ends with the process."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":
            yield
            return
        with self._writing():
            folder = os.open(self.path, os.O_RDONLY)
        try:
            self._lock(folder)
            yield
        finally:
            os.close(folder)

    def _lock(self, folder: int) -> None:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is running {self.path} now; wait for its end, or stop it") from error
        except OSError:  # this file system has no locks
            return

    def begin(self, config_yaml: str) -> None:
        """Start a new run here; files of a run that reached no checkpoint are deleted."""
        self.refuse_if_used()
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in (*map(self.path.joinpath, _RESULTS), self._budgets):
                leftover.unlink(missing_ok=True)
            if self.clients.is_dir():
                shutil.rmtree(self.clients)
            self.write_config(config_yaml)
            self._rounds.write_bytes(b"")

    def has_checkpoints(self) -> bool:
        """Return whether the folder holds checkpoints."""
        return any(self._checkpoints.glob("*.json"))

    def refuse_if_used(self) -> None:
        """Raise ConfigError if the folder holds checkpoints."""
        if self.has_checkpoints():
            raise ConfigError(
                f"{self.path} holds a run already; continue it with resume={self.path}, or choose another hydra.run.dir"
            )

    def write_config(self, config_yaml: str) -> None:
        """Write ``config.yaml``."""
        with self._writing():
            write_atomically(self.path / "config.yaml", config_yaml.encode())

    def resume(self) -> ServerState | None:
        """Return the state to resume from (None: from the start) and drop later rounds.

        It is the newest intact checkpoint whose rounds are all on record; newer ones are logged, and
        discarded.

        Raises
        ------
        CheckpointError
            If there are checkpoints, but no such one.
        """
        rounds, lines, reasons = checkpoint_rounds(self._checkpoints), self.read_lines(strict=False), []
        state: ServerState | None = None
        for server_round in reversed(rounds):
            try:
                state = self._consistent(server_round, lines)
                break
            except CheckpointError as error:
                reasons.append(str(error))
        if rounds and state is None:
            raise CheckpointError(f"{reasons[0]}, and no older checkpoint serves; restore the file, or start anew")
        last = 0 if state is None else state.server_round
        for server_round, reason in zip(reversed(rounds), reasons, strict=False):
            log.warning("%s; the run goes on from round %d", reason, last)
            discard_checkpoint(self._checkpoints, server_round)
        with self._writing():
            for leftover in [*self.path.glob(".*.partial"), *self._checkpoints.glob(".*.partial")]:
                leftover.unlink()
            write_atomically(self._rounds, b"".join(_json_line(line) for line in lines[:last]))
        return state

    def _consistent(self, server_round: int, lines: Sequence[Mapping[str, Any]]) -> ServerState:
        """Return the checkpoint of a round, if the lines hold all rounds up to it."""
        state = read_checkpoint(self._checkpoints, server_round)
        if [line["server_round"] for line in lines[:server_round]] != list(range(1, server_round + 1)):
            raise CheckpointError(f"{self._rounds} does not hold rounds 1 to {server_round} of the checkpoint")
        return state

    def add_budgets(self, brought: Mapping[int, Budget]) -> None:
        """Record the budgets from devices, by client id."""
        known = {**self.read_budgets(), **brought}
        limits = {str(client_id): asdict(known[client_id]) for client_id in sorted(known)}
        with self._writing():
            write_atomically(self._budgets, json.dumps(limits, indent=1).encode() + b"\n")

    def read_budgets(self) -> dict[int, Budget]:
        """Return the budgets from devices, by client id."""
        if not self._budgets.is_file():
            return {}
        try:
            found = json.loads(self._budgets.read_text())
            return {int(client_id): Budget(**limits) for client_id, limits in found.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self._budgets} cannot be read ({one_line(error)}); restore the file") from error

    def append_round(self, record: RoundRecord) -> None:
        """Add one line to ``rounds.jsonl``."""
        line = {key: value for key, value in asdict(record).items() if value or key not in _OPTIONAL}
        with self._writing(), self._rounds.open("ab") as file:
            file.write(_json_line(line))

    def save_state(self, state: ServerState) -> None:
        """Write a checkpoint; the records of its rounds are synced first."""
        with self._writing():
            with self._rounds.open("ab") as file:
                os.fsync(file.fileno())
            save_checkpoint(self._checkpoints, state)
            sync_folder(self.path)

    def save_model(self, state: ServerState, name: str = "model.safetensors") -> None:
        """Write the model of a state."""
        model = {name: tensor.contiguous() for name, tensor in state.params.items()}
        with self._writing():
            write_atomically(self.path / name, save(model))

    def finish(
        self, state: ServerState, config: Mapping[str, Any], expected: Mapping[str, float], **results: Any
    ) -> dict[str, Any]:
        """Write the model and the manifest, with further results; return the manifest."""
        self.save_model(state)
        lines = self.read_lines()
        totals = {key: sum(line[key] for line in lines) for key in _TOTALS}
        totals |= {"rounds": len(lines), "failures": sum(len(line["failures"]) for line in lines)}
        totals["good_rounds"] = sum(map(_is_good, lines))
        final = lines[-1]["metrics"] if lines else {}
        return self.write_manifest(config, expected, totals=totals, final_metrics=final, **results)

    def write_manifest(
        self, config: Mapping[str, Any], expected: Mapping[str, float], **results: Any
    ) -> dict[str, Any]:
        """Write ``manifest.json`` and return it."""
        manifest = {
            "config": dict(config),
            "versions": _versions(),
            "made": provenance(Path.cwd()),
            "seed": config["seed"],
            "totals": {},
            "final_metrics": {},
            "expected": dict(expected),
            **results,
        }
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "manifest.json", json.dumps(_plain(manifest), indent=2).encode() + b"\n")
        return manifest

    def read_manifest(self) -> dict[str, Any]:
        """Return the manifest of a finished run."""
        manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        return manifest

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Convert an OSError into a FedLPError with the resume command; the last checkpoint is kept."""
        try:
            yield
        except OSError as error:
            remedy = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
            begun = (self.path / "config.yaml").is_file()
            raise FedLPError(
                f"{error.filename or self._rounds} cannot be written ({error.strerror}); {remedy}, then "
                + (f"go on with resume={self.path}" if begun else "start the run again")
            ) from error

    def read_lines(self, strict: bool = True) -> list[dict[str, Any]]:
        """Return the rounds; a torn last line of a killed run is left out.

        Parameters
        ----------
        strict : bool
            Whether a damaged line before the last is an error; else the lines before it are returned.
        """
        if not self._rounds.is_file():
            return []
        raw = self._rounds.read_bytes().split(b"\n")
        lines = []
        for number, line in enumerate(raw, start=1):
            try:
                if line:
                    lines.append(_read_line(line))
            except ValueError as error:
                if strict and number < len(raw):
                    raise CheckpointError(f"{self._rounds}, line {number}: {error}; restore the file") from error
                break
        return lines


def _read_line(line: bytes) -> dict[str, Any]:
    """Return one round; ValueError for an invalid line."""
    value = json.loads(line)
    if not isinstance(value, dict) or not value.keys() >= _KEYS:
        raise ValueError("not the record of a round")
    for key in _TOTALS:
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


def _json_line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(value)).encode() + b"\n"


def _plain(value: Any) -> Any:
    """Return a value with non-finite numbers as None, valid JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
