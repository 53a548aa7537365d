"""What a client keeps between rounds, on its own disk: personal heads, or what it could not send.

One file per client and round. A client reads the newest one from before the current round, so a run that is resumed
from an earlier checkpoint finds the head it had then. Versions that no kept checkpoint can reach are deleted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

_NAME = re.compile(r"round-(\d+)\.safetensors")


class ClientStore:
    """A folder with a sub-folder per client.

    Parameters
    ----------
    root : Path
        Made on the first save.
    horizon : int
        Rounds that a resumed run may go back.
    """

    def __init__(self, root: Path, horizon: int) -> None:
        self.root = root
        self.horizon = horizon

    def save(self, client_id: int, server_round: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a version, atomically, and drop those that are out of reach."""
        folder = self.root / str(client_id)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"round-{server_round:06d}.safetensors"
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(path)
        reachable = [version for version in self._rounds(client_id) if version <= server_round - self.horizon]
        for stale in reachable[:-1]:
            (folder / f"round-{stale:06d}.safetensors").unlink(missing_ok=True)

    def load(self, client_id: int, before_round: int) -> dict[str, Tensor]:
        """Return the newest version from before a round; empty where there is none."""
        rounds = [version for version in self._rounds(client_id) if version < before_round]
        if not rounds:
            return {}
        head: dict[str, Tensor] = load_file(self.root / str(client_id) / f"round-{rounds[-1]:06d}.safetensors")
        return head

    def _rounds(self, client_id: int) -> list[int]:
        folder = self.root / str(client_id)
        if not folder.is_dir():
            return []
        return sorted(int(match[1]) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name)))
