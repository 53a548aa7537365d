"""A worker process of the local engine as its parent sees it: its pipe, its areas of memory, its tasks."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext
from multiprocessing.process import BaseProcess

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedlp.simulation.shared_blocks import Block
from fedlp.simulation.transport import Area
from fedlp.simulation.worker import serve

Numbered = list[tuple[int, Message]]
"""Messages with their places in the order."""


@dataclass
class Task:
    """Messages in flight together: positions in the order, slot, start of their work, and clients that they are for."""

    messages: Numbered
    slot: int
    since: float
    clients: int


@dataclass
class Worker:
    """A process, its end of the pipe, its slots (areas for requests and replies), and its tasks in order.

    Attributes
    ----------
    block : Block or None
        Shared memory of the slots of a spawned worker.
    """

    process: BaseProcess
    connection: Connection
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


def start_forked(
    fork: ForkContext,
    num_slots: int,
    capacity: int,
    load_app: Callable[[], ClientApp],
    run_config: dict[str, bool | float | int | str],
    num_clients: int,
    lifeline: tuple[Connection, Connection],
) -> Worker:
    """Fork a worker, which loads the app and serves until its pipe or the lifeline closes.

    Parameters
    ----------
    num_slots : int
        Tasks that it may have waiting, >= 1.
    capacity : int
        Bytes of each area of memory.
    lifeline : (reader, writer)
        Pipe of which only this process keeps the end for writing.
    """
    slots = [(_anonymous(capacity), _anonymous(capacity)) for _ in range(num_slots)]
    parent, child = fork.Pipe()
    process = fork.Process(
        target=_run_forked, args=(parent, child, slots, load_app, run_config, num_clients, lifeline), daemon=True
    )
    process.start()
    child.close()
    return Worker(process, parent, slots)


def _anonymous(capacity: int) -> Area:
    return Area(memoryview(mmap.mmap(-1, capacity)))


def _run_forked(
    parent: Connection,
    child: Connection,
    slots: list[tuple[Area, Area]],
    load_app: Callable[[], ClientApp],
    run_config: dict[str, bool | float | int | str],
    num_partitions: int,
    lifeline: tuple[Connection, Connection],
) -> None:
    parent.close()
    lifeline[1].close()
    serve(child, slots, load_app, run_config, num_partitions, lifeline[0])
