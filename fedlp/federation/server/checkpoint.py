"""Checkpoints: the complete state between rounds, written atomically; the previous one is kept.

A checkpoint is ``round-N.safetensors`` (model, server optimizer and the policy's
memory) and ``round-N.json`` (its SHA-256), written last. A
folder without a matching pair holds no checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedlp.errors import CheckpointError, one_line

log = logging.getLogger("fedlp")

_NAME = re.compile(r"round-(\d+)\.json")
_MODEL, _OPTIMIZER, _MEMORY, _CLOCK, _SUSPECTS = "model.", "optimizer.", "memory.", "clock.", "suspects"


@dataclass(frozen=True, slots=True)
class ServerState:
    """All memory between rounds.

    Attributes
    ----------
    memory : mapping
        The policy's.
    clock : mapping
        Virtual time, and clients in flight with the versions that they train on; empty without a virtual clock.
    suspects : tuple of int
        Clients whose update broke the model in a round that was undone, sorted; their updates are rejected.
    """

    server_round: int
    params: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    suspects: tuple[int, ...] = ()
    clock: Mapping[str, Tensor] = field(default_factory=dict)


def save_checkpoint(folder: Path, state: ServerState) -> None:
    """Write a checkpoint and delete all but it and the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_MODEL + name: tensor.contiguous() for name, tensor in state.params.items()}
    tensors |= {_OPTIMIZER + name: tensor.contiguous() for name, tensor in state.optimizer.items()}
    tensors |= {_MEMORY + name: tensor.contiguous() for name, tensor in state.memory.items()}
    tensors |= {_CLOCK + name: tensor.contiguous() for name, tensor in state.clock.items()}
    if state.suspects:
        tensors[_SUSPECTS] = torch.tensor(state.suspects)
    data = save(tensors)
    stem = f"round-{state.server_round:06d}"
    write_atomically(folder / f"{stem}.safetensors", data)
    about = {"server_round": state.server_round, "sha256": hashlib.sha256(data).hexdigest()}
    write_atomically(folder / f"{stem}.json", json.dumps(about).encode())
    for stale in checkpoint_rounds(folder)[:-2]:
        for suffix in ("json", "safetensors"):
            (folder / f"round-{stale:06d}.{suffix}").unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> ServerState | None:
    """Return the newest intact checkpoint, None if there is none; damaged ones are logged.

    Raises
    ------
    CheckpointError
        If all are damaged; names the newest file.
    """
    reasons: list[str] = []
    for server_round in reversed(checkpoint_rounds(folder)):
        try:
            state = read_checkpoint(folder, server_round)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            log.warning("%s; the checkpoint of round %d is used", reason, server_round)
        return state
    if reasons:
        raise CheckpointError(f"{reasons[0]}, and none before it is whole; restore the file")
    return None


def checkpoint_rounds(folder: Path) -> list[int]:
    """Return the rounds of the checkpoints in a folder, sorted, intact or not."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name)))


def read_checkpoint(folder: Path, server_round: int) -> ServerState:
    """Return the checkpoint of a round; CheckpointError, which names the file, if it is damaged."""
    stem = folder / f"round-{server_round:06d}"
    try:
        about = json.loads(stem.with_suffix(".json").read_text())
        data = stem.with_suffix(".safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            raise CheckpointError(f"checkpoint {stem}.safetensors is damaged (SHA-256 differs)")
        tensors = load(data)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {stem} cannot be read ({one_line(error)})") from error

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    suspects = tuple(tensors[_SUSPECTS].tolist()) if _SUSPECTS in tensors else ()
    return ServerState(server_round, part(_MODEL), part(_OPTIMIZER), part(_MEMORY), suspects, part(_CLOCK))


def discard_checkpoint(folder: Path, server_round: int) -> None:
    """Discard a checkpoint; its files stay, the JSON one as ``round-N.json.discarded``."""
    path = folder / f"round-{server_round:06d}.json"
    path.replace(path.with_name(f"{path.name}.discarded"))


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file of some parts atomically and durably, even through a power cut.

    Raises
    ------
    OSError
        If it cannot be written; names the file. An earlier file stays, and no partial one is left.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names of a folder's files durable, if the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some network file systems have no such call
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
                raise
        finally:
            os.close(descriptor)
