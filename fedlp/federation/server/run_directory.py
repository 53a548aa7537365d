"""Run directory: config, rounds, manifest, model, checkpoints."""

from __future__ import annotations

import errno
import json
import logging
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
from fedlp.federation.server.round_lines import add_up, each_line, json_line, keep_lines, plain
from fedlp.types import Budget, RoundRecord

if sys.platform != "win32":  # which locks no folders: there a run is not guarded from a second one
    import fcntl

log = logging.getLogger("fedlp")

_PACKAGES = ("fedlp", "flwr", "torch", "torchvision", "transformers", "hydra-core", "numpy")
_RESULTS = ("manifest.json", "model.safetensors", "model-best.safetensors")
_OPTIONAL = ("evaluations", "absent", "phases", "privacy", "clipped", "staleness", "simulated")  # left out where empty


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
        rounds, reasons = checkpoint_rounds(self._checkpoints), list[str]()
        on_record = [(line["server_round"], end) for line, end in each_line(self._rounds, strict=False)]
        numbers = [number for number, _ in on_record]
        state: ServerState | None = None
        for server_round in reversed(rounds):
            try:
                state = self._consistent(server_round, numbers)
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
            keep_lines(self._rounds, on_record[last - 1][1] if last else 0)
        return state

    def _consistent(self, server_round: int, numbers: Sequence[int]) -> ServerState:
        """Return the checkpoint of a round, if all rounds up to it are on record."""
        state = read_checkpoint(self._checkpoints, server_round)
        if list(numbers[:server_round]) != list(range(1, server_round + 1)):
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
            file.write(json_line(line))

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
        self, state: ServerState | None, config: Mapping[str, Any], expected: Mapping[str, float], **results: Any
    ) -> dict[str, Any]:
        """Write the model of a state, if any, and the manifest, with further results; return the manifest."""
        if state is not None:
            self.save_model(state)
        totals, final = add_up(self._rounds)
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
            write_atomically(self.path / "manifest.json", json.dumps(plain(manifest), indent=2).encode() + b"\n")
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
        return [line for line, _ in each_line(self._rounds, strict)]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
