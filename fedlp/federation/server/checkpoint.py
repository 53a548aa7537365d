"""Checkpoints: exactly the state that outlives a round, written atomically; the previous one is kept.

A checkpoint is ``round-N.safetensors`` (model, server optimiser and what the policy
remembers) and ``round-N.json`` (its SHA-256), written last. A
folder without a matching pair holds nothing that counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedlp.errors import CheckpointError

_NAME = re.compile(r"round-(\d+)\.json")
_MODEL, _OPTIMIZER, _MEMORY, _SUSPECTS = "model.", "optimizer.", "memory.", "suspects"


@dataclass(frozen=True, slots=True)
class ServerState:
    """All memory between rounds.

    Attributes
    ----------
    memory : mapping
        The policy's.
    suspects : tuple of int
        Clients whose update broke the model in a round that was undone, sorted; their updates are rejected.
    """

    server_round: int
    params: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    suspects: tuple[int, ...] = ()


def save_checkpoint(folder: Path, state: ServerState) -> None:
    """Write a checkpoint and delete all but it and the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_MODEL + name: tensor.contiguous() for name, tensor in state.params.items()}
    tensors |= {_OPTIMIZER + name: tensor.contiguous() for name, tensor in state.optimizer.items()}
    tensors |= {_MEMORY + name: tensor.contiguous() for name, tensor in state.memory.items()}
    if state.suspects:
        tensors[_SUSPECTS] = torch.tensor(state.suspects)
    data = save(tensors)
    stem = f"round-{state.server_round:06d}"
    write_atomically(folder / f"{stem}.safetensors", data)
    about = {"server_round": state.server_round, "sha256": hashlib.sha256(data).hexdigest()}
    write_atomically(folder / f"{stem}.json", json.dumps(about).encode())
    for stale in _rounds(folder)[:-2]:
        for suffix in ("json", "safetensors"):
            (folder / f"round-{stale:06d}.{suffix}").unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> ServerState | None:
    """Return the newest checkpoint, or None where there is none.

    Raises
    ------
    CheckpointError
        If the newest one is damaged; names the file and the way back.
    """
    rounds = _rounds(folder)
    if not rounds:
        return None
    stem = folder / f"round-{rounds[-1]:06d}"
    remedy = f"delete {stem.name}.json to go on from the checkpoint before"
    try:
        about = json.loads(stem.with_suffix(".json").read_text())
        data = stem.with_suffix(".safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            raise CheckpointError(f"checkpoint {stem}.safetensors is damaged (SHA-256 differs); {remedy}")
        tensors = load(data)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {stem} cannot be read ({error}); {remedy}") from error

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    suspects = tuple(tensors[_SUSPECTS].tolist()) if _SUSPECTS in tensors else ()
    return ServerState(rounds[-1], part(_MODEL), part(_OPTIMIZER), part(_MEMORY), suspects)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, even through a power cut.

    Raises
    ------
    OSError
        If it cannot be written; names the file. What was there before stays, and nothing is left of the attempt.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _rounds(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name)))
