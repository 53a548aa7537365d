"""A worker of the local engine as its parent sees it: its pipe, its areas of memory, its tasks."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedlp.simulation.shared_blocks import Block
from fedlp.simulation.transport import Area
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
    """

    process: Process
    connection: Any
    slots: list[tuple[Area, Area]]
    tasks: deque[Task] = field(default_factory=deque)
    block: Block | None = None

    def free_slot(self) -> int | None:
        """Return a free slot."""
        used = {task.slot for task in self.tasks}
        return next((slot for slot in range(len(self.slots)) if slot not in used), None)

    def end(self) -> None:
        """Wait for the end of the process, and release what was its own."""
        self.process.join()
        self.connection.close()
        self.slots.clear()  # views of the block
        if self.block is not None:
            self.block.remove()
            self.block.leave()
