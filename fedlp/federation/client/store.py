"""Client store between rounds, on its own disk: personal heads and residuals.

One file per client and round. A client reads the newest one from before the current round, so a run that is resumed
from an earlier checkpoint finds the head it had then. Versions that no kept checkpoint can reach are deleted. Every
file holds its own digest: instead of a damaged one the version before serves, and a warning names the file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedlp.errors import DataError, one_line
from fedlp.federation.client.sealed_tensors import open_sealed, seal_tensors
from fedlp.federation.server.checkpoint import write_atomically

log = logging.getLogger("fedlp")

_NAME = re.compile(r"round-(\d+)\.safetensors")


class ClientStore:
    """Store in a folder with a sub-folder per client.

    Parameters
    ----------
    root : Path
        Made on the first save.
    horizon : int
        Rounds by which a resumed run may go back.
    """

    def __init__(self, root: Path, horizon: int) -> None:
        self.root = root
        self.horizon = horizon

    def save(self, client_id: int, server_round: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a version, atomically, and drop those out of reach; DataError if the disk refuses."""
        folder = self.root / str(client_id)
        data = seal_tensors(tensors)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / f"round-{server_round:06d}.safetensors", *data)
        except OSError as error:
            raise DataError(
                f"make room: client {client_id} cannot save what it needs in later rounds ({one_line(error)})"
            ) from error
        reachable = [version for version in self._rounds(client_id) if version <= server_round - self.horizon]
        for stale in reachable[:-1]:
            (folder / f"round-{stale:06d}.safetensors").unlink(missing_ok=True)

    def load(self, client_id: int, before_round: int) -> dict[str, Tensor]:
        """Return the newest intact version from before a round; empty if there is none."""
        rounds = [version for version in self._rounds(client_id) if version < before_round]
        for number, version in enumerate(reversed(rounds), start=1):
            path = self.root / str(client_id) / f"round-{version:06d}.safetensors"
            try:
                return open_sealed(path.read_bytes())
            except (OSError, ValueError) as error:
                instead = "the version before it" if number < len(rounds) else "nothing, as at first,"
                log.warning(
                    "client %d: %s is damaged (%s); %s is used instead", client_id, path, one_line(error), instead
                )
        return {}

    def _rounds(self, client_id: int) -> list[int]:
        folder = self.root / str(client_id)
        if not folder.is_dir():
            return []
        return sorted(int(match[1]) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name)))
