"""A worker process of the local engine as its parent sees it: its pipe, its areas of memory, its tasks."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext

from flwr.app import Message
from flwr.clientapp import ClientApp

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
    """A process, its end of the pipe, its slots (areas for requests and replies), and its tasks in order."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    slots: list[tuple[Area, Area]]
    tasks: deque[Task] = field(default_factory=deque)

    def free_slot(self) -> int | None:
        """Return a free slot."""
        used = {task.slot for task in self.tasks}
        return next((slot for slot in range(len(self.slots)) if slot not in used), None)


def start_worker(
    fork: ForkContext,
    num_slots: int,
    capacity: int,
    load_app: Callable[[], ClientApp],
    run_config: dict[str, bool | float | int | str],
    num_clients: int,
    lifeline: tuple[int, int],
) -> Worker:
    """Fork a worker, which loads the app and serves until its pipe or the lifeline closes.

    Parameters
    ----------
    num_slots : int
        Tasks that it may have waiting, >= 1.
    capacity : int
        Bytes of each area of memory.
    """
    slots = [(Area(capacity), Area(capacity)) for _ in range(num_slots)]
    parent, child = fork.Pipe()
    process = fork.Process(
        target=_run_worker, args=(parent, child, slots, load_app, run_config, num_clients, lifeline), daemon=True
    )
    process.start()
    child.close()
    return Worker(process, parent, slots)


def _run_worker(
    parent: Connection,
    child: Connection,
    slots: list[tuple[Area, Area]],
    load_app: Callable[[], ClientApp],
    run_config: dict[str, bool | float | int | str],
    num_partitions: int,
    lifeline: tuple[int, int],
) -> None:
    parent.close()
    os.close(lifeline[1])
    serve(child, slots, load_app, run_config, num_partitions, lifeline[0])
