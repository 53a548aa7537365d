"""Shared memory by name, for workers that inherit nothing: blocks for messages, and parcels of objects.

A parcel is pickled by the parent for its own worker processes, once for all of them. Its block is readable to the same
user alone; nothing that came from outside is ever unpickled.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

from fedlp.errors import FedLPError, one_line
from fedlp.simulation.transport import aligned

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


@dataclass(frozen=True)
class Label:
    """Name of a parcel's block, and the bytes of each buffer in it: the pickled object, then its arrays."""

    name: str
    sizes: tuple[int, ...]
    digest: bytes  # of the pickled object, SHA-256; the label comes through the parent's private pipe


class Parcel:
    """An object in shared memory; NumPy arrays in it are not copied where it is opened.

    Raises
    ------
    FedLPError
        If the object cannot be pickled, or there is no room.
    """

    def __init__(self, content: object) -> None:
        arrays: list[pickle.PickleBuffer] = []
        try:
            head = pickle.dumps(content, protocol=5, buffer_callback=arrays.append)
        except Exception as error:  # a class of the user's may raise anything
            raise FedLPError(explain(error)) from error
        buffers = [memoryview(head), *(array.raw() for array in arrays)]
        ends = _ends([len(buffer) for buffer in buffers])
        check_room(ends[-1])
        self._block = Block(create=True, size=ends[-1])
        for buffer, start in zip(buffers, [0, *ends], strict=False):
            self._block.memory[start : start + len(buffer)] = buffer
        self.label = Label(self._block.name, tuple(len(buffer) for buffer in buffers), hashlib.sha256(head).digest())

    def remove(self) -> None:
        """Remove the parcel; those who have opened it keep its arrays."""
        self._block.remove()
        self._block.leave()


def open_parcel(label: Label) -> Any:
    """Return the object of a parcel that the parent has made; FedLPError if its block holds another."""
    view = Block(name=label.name).memory
    starts = [0, *_ends(label.sizes)]
    head, *arrays = [view[start : start + size] for start, size in zip(starts, label.sizes, strict=False)]
    image = bytes(head)  # nobody can change it between check and use
    if hashlib.sha256(image).digest() != label.digest:
        raise FedLPError("the shared memory of this run was changed by another process; start the run again")
    return pickle.loads(image, buffers=arrays)  # the parent's own bytes


def explain(error: Exception) -> str:
    """Return why an object cannot be handed to spawned workers, and what to do."""
    return (
        f"spawned workers cannot be given the run's objects ({type(error).__name__}: {one_line(error)}); define "
        "models, functions and classes at the top level of a module or script, not in a function or a notebook, or set "
        "simulation.start=fork where the system can fork"
    )


def _ends(sizes: Sequence[int]) -> list[int]:
    """Return the aligned end of each of several buffers, one behind another."""
    ends, end = [], 0
    for size in sizes:
        end += aligned(size)
        ends.append(end)
    return ends
