"""Start of workers: forked, spawned as fresh interpreters, or none, where clients train in this process."""

from __future__ import annotations

import multiprocessing
import os
import selectors
import sys
from multiprocessing.connection import Connection
from typing import Protocol

from fedlp.errors import ConfigError
from fedlp.simulation.in_process import InProcess
from fedlp.simulation.shared_blocks import check_room
from fedlp.simulation.spawning import UNGUARDED, WORKER_NAME, Spawning
from fedlp.simulation.transport import Area
from fedlp.simulation.worker import serve
from fedlp.simulation.worker_process import Duty, Worker


def start_method(asked: str) -> str:
    """Return "fork" or "spawn"; ConfigError if this system cannot fork.

    "auto" forks, but where the system cannot (Windows) or its libraries do not survive it (macOS).
    """
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    if asked == "fork" and not can_fork:
        raise ConfigError("simulation.start=fork: this system cannot fork processes; set simulation.start=spawn")
    if asked != "auto":
        return asked
    return "fork" if can_fork and sys.platform != "darwin" else "spawn"


def refuse_unguarded() -> None:
    """End this process if it is a spawned worker: its main script starts a run while it is imported."""
    if multiprocessing.current_process().name.startswith(WORKER_NAME):
        os._exit(UNGUARDED)


class Starter(Protocol):
    """Start of the workers of one grid."""

    def selector(self) -> selectors.BaseSelector:
        """Return a selector that can wait for workers' pipes."""

    def start(self) -> Worker:
        """Start a worker, without waiting for it."""

    def await_ready(self, worker: Worker) -> None:
        """Wait until a worker serves; FedLPError if it cannot."""

    def close(self) -> None:
        """Release what workers share; those that still live end."""


def make_starter(method: str, num_workers: int, duty: Duty) -> Starter:
    """Return the starter of a method, "fork" or "spawn".

    Parameters
    ----------
    num_workers : int
        Workers that live at once; with 0 clients train in this process.

    Raises
    ------
    FedLPError
        If spawned workers cannot be handed ``duty.load_app``, or there is no room for their messages.
    """
    if num_workers == 0:
        return InProcess(duty)
    if method == "fork":
        return _Forking(duty)
    check_room(num_workers * duty.num_slots * 2 * duty.capacity)
    return Spawning(duty)


class _Forking:
    def __init__(self, duty: Duty) -> None:
        self._fork, self._duty = multiprocessing.get_context("fork"), duty
        self._lifeline = self._fork.Pipe(duplex=False)

    def selector(self) -> selectors.BaseSelector:
        return selectors.DefaultSelector()

    def start(self) -> Worker:
        slots = self._duty.make_slots()
        parent, child = self._fork.Pipe()
        process = self._fork.Process(
            target=_run_forked, args=(parent, child, slots, self._duty, self._lifeline), daemon=True
        )
        process.start()
        child.close()
        return Worker(process, parent, slots)

    def await_ready(self, worker: Worker) -> None:
        """Do nothing: what a worker inherits is ready."""

    def close(self) -> None:
        for end in self._lifeline:
            end.close()


def _run_forked(
    parent: Connection,
    child: Connection,
    slots: list[tuple[Area, Area]],
    duty: Duty,
    lifeline: tuple[Connection, Connection],
) -> None:
    parent.close()
    lifeline[1].close()
    serve(child, slots, duty.load_node, lifeline[0])
