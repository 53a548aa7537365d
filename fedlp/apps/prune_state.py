"""State of an unfinished one-shot pruning on disk: a run that was killed goes on at the layer where it was.

``state/`` in the run directory has one file of tensors per finished part: the Fisher information, then each layer's new
weights. ``state.json`` lists them with their SHA-256 digests, the allocation, and the fingerprint of config and model.
It is written last, and every file under a temporary name first: every file on its list is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedlp.errors import CheckpointError, ConfigError
from fedlp.models import state_tensors

log = logging.getLogger("fedlp")

_FORMAT = 1


class PruneState:
    """Finished parts of one pruning, by name; also of an earlier process, if config and model are the same.

    Parameters
    ----------
    folder : Path
    fingerprint : str
        :func:`fingerprint` of config and model.

    Raises
    ------
    ConfigError
        If the folder holds the state of another config or model.
    CheckpointError
        If its list of parts cannot be read.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder, self._index = folder, folder / "state.json"
        self._content: dict[str, Any] = {"format": _FORMAT, "fingerprint": fingerprint, "kept": None, "parts": {}}
        if not self._index.exists():
            return
        try:
            stored = json.loads(self._index.read_text(encoding="utf-8"))
            is_same = (stored["format"], stored["fingerprint"]) == (_FORMAT, fingerprint)
            _check_content(stored)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self._index} cannot be read; delete {folder} to begin anew") from error
        if not is_same:
            raise ConfigError(
                f"{folder} holds the unfinished pruning of another config or model; choose another hydra.run.dir, or "
                "delete it"
            )
        self._content = stored

    @property
    def kept(self) -> dict[str, int] | None:
        """Units kept of each layer, once they are known."""
        return self._content["kept"]  # type: ignore[no-any-return]

    def keep(self, kept: Mapping[str, int]) -> None:
        """Store the allocation."""
        self._content["kept"] = dict(kept)
        self._write_index()

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors of a finished part; None if it is not there, or damaged, which a line says."""
        if name not in self._content["parts"]:
            return None
        path = self._path(name)
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() == self._content["parts"][name]:
                found: dict[str, Tensor] = load_file(path)
                return found
        except (OSError, SafetensorError):
            pass
        log.warning("%s is damaged: that part is computed anew.", path)
        return None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of a finished part."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        partial = path.with_suffix(".part")
        save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, partial)
        self._content["parts"][name] = hashlib.sha256(partial.read_bytes()).hexdigest()
        os.replace(partial, path)
        self._write_index()

    def clear(self) -> None:
        """Delete all of it."""
        for path in (self._index, *(self._path(name) for name in self._content["parts"])):
            path.unlink(missing_ok=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"

    def _write_index(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._index.with_suffix(".part")
        partial.write_text(json.dumps(self._content), encoding="utf-8")
        os.replace(partial, self._index)


def _check_content(stored: Mapping[str, Any]) -> None:
    kept, parts = stored["kept"], stored["parts"]
    if not (kept is None or all(isinstance(count, int) for count in kept.values())):
        raise ValueError("kept")
    if not all(isinstance(digest, str) for digest in parts.values()):
        raise ValueError("parts")


def fingerprint(config: str, model: nn.Module) -> str:
    """Return the SHA-256 of a config as text and a model's tensors."""
    digest = hashlib.sha256(config.encode())
    for name, tensor in state_tensors(model).items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
