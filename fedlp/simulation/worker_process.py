"""A worker of the local engine as its parent sees it: its pipe, its areas of memory, its tasks."""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, Message
from flwr.clientapp import ClientApp

from fedlp.federation.flower_compat import make_array
from fedlp.simulation.shared_blocks import Block
from fedlp.simulation.transport import Area, WrapBuffer
from fedlp.simulation.worker import Node, RunSettings

Numbered = list[tuple[int, Message]]
"""Messages with their numbers."""


@dataclass
class Task:
    """Messages in flight together: numbers, slot, start of their work, clients that they are for, seconds for each."""

    messages: Numbered
    slot: int
    since: float
    clients: int
    timeout: float


@dataclass(frozen=True)
class Duty:
    """Task common to all workers of a grid.

    Attributes
    ----------
    num_slots : int
        Tasks that a worker may have waiting, >= 1.
    capacity : int
        Bytes of each area of memory; a slot has two.
    load_app : callable
        Returns the ClientApp.
    run_config : dict
        Content of ``Context.run_config``.
    num_clients : int
        Nodes.
    """

    num_slots: int
    capacity: int
    load_app: Callable[[], ClientApp]
    run_config: RunSettings
    num_clients: int

    def load_node(self) -> Node:
        """Return the clients' side of the grid."""
        return Node(self.load_app(), self.run_config, self.num_clients)

    def make_slots(self) -> list[tuple[Area, Area]]:
        """Return areas of memory of this process, which forked ones inherit."""

        def area() -> Area:
            return Area(memoryview(mmap.mmap(-1, self.capacity)))

        return [(area(), area()) for _ in range(self.num_slots)]


class Process(Protocol):
    """Process of a worker, as a grid uses it."""

    @property
    def exitcode(self) -> int | None:
        """Exit code; None while it lives."""

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""

    def kill(self) -> None:
        """End it at once."""


@dataclass
class Worker:
    """A process, its end of the pipe, its slots (areas for requests and replies), and its tasks in order.

    Attributes
    ----------
    connection : Connection, or what has its methods
    block : Block or None
        Shared memory of the slots of a spawned worker.
    lent : dict from int to list of weak references
        Slots whose replies are in use, and the owners of their arrays.
    """

    process: Process
    connection: Any
    slots: list[tuple[Area, Area]]
    tasks: deque[Task] = field(default_factory=deque)
    block: Block | None = None
    lent: dict[int, list[weakref.ref[Any]]] = field(default_factory=dict)

    def free_slot(self) -> int | None:
        """Return a free slot."""
        used = {task.slot for task in self.tasks} | self._lent_slots()
        return next((slot for slot in range(len(self.slots)) if slot not in used), None)

    def lend(self, slot: int, num_tasks: int) -> WrapBuffer | None:
        """Return how to make arrays of a reply without a copy; None where too few slots would be left.

        The slot is free again once nothing refers to these arrays any more.

        Parameters
        ----------
        num_tasks : int
            Slots that must be left.
        """
        if len(self.slots) - len(self._lent_slots()) <= num_tasks:
            return None
        references = self.lent[slot] = list[weakref.ref[Any]]()

        def wrap(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
            holder = np.frombuffer(data, np.uint8)  # every view of its memory keeps it
            references.append(weakref.ref(holder))
            return make_array(dtype, shape, stype, holder.data)

        return wrap

    def _lent_slots(self) -> set[int]:
        self.lent = {slot: found for slot, found in self.lent.items() if any(one() is not None for one in found)}
        return set(self.lent)

    def end(self) -> None:
        """Wait for the end of the process, and release what was its own."""
        self.process.join()
        self.connection.close()
        self.slots.clear()  # views of the block
        if self.block is not None:
            self.block.remove()
            self.block.leave()
