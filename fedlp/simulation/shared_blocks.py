"""Shared memory by name, for workers that inherit nothing."""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from fedlp.errors import FedLPError

_MOUNT = Path("/dev/shm")  # where Linux keeps shared memory; a full one ends whoever writes to it


class Block(SharedMemory):
    """Shared memory whose views may outlive it: it is unmapped with the last of them."""

    _is_removed = False

    def __del__(self) -> None:
        self.leave()

    @property
    def memory(self) -> memoryview:
        """View of all bytes, which stays valid without this object."""
        assert self.buf is not None
        return self.buf[:]

    def leave(self) -> None:
        """Detach this process."""
        with suppress(OSError, BufferError):
            self.close()

    def remove(self) -> None:
        """Remove the name; whoever is attached keeps the memory. Done twice, it has no effect."""
        if not self._is_removed:
            self._is_removed = True
            self.unlink()


def check_room(size: int) -> None:
    """Raise FedLPError if shared memory has no room for ``size`` bytes."""
    if sys.platform != "linux" or not _MOUNT.is_dir():
        return
    free = shutil.disk_usage(_MOUNT).free
    if size > free:
        raise FedLPError(
            f"spawned workers need up to {size / 1e6:,.0f} MB of shared memory, and {_MOUNT} has {free / 1e6:,.0f} MB; "
            "enlarge it (docker run --shm-size), set fewer simulation.workers, or set simulation.start=fork"
        )
