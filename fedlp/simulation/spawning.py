"""Start of worker processes as fresh interpreters, by Python's ``multiprocessing``.

What it hands to a process are texts, numbers and pipes; all else lies in shared memory
(:mod:`fedlp.simulation.parcel`). A worker imports the user's modules itself, and the main script too.
"""

from __future__ import annotations

import json
import multiprocessing
import selectors
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing.connection import Connection, wait

from fedlp.errors import FedLPError
from fedlp.simulation.named import missing_script
from fedlp.simulation.parcel import Label, Parcel, hand_over_of, make_app, open_parcel
from fedlp.simulation.pipe_selector import PipeSelector
from fedlp.simulation.shared_blocks import Block
from fedlp.simulation.transport import Area
from fedlp.simulation.worker import Node, serve
from fedlp.simulation.worker_process import Duty, Worker

UNGUARDED = 93  # exit code of a worker whose main script starts a run while it is imported
WORKER_NAME = "fedlp-worker"
_READY = b""


class Spawning:
    """Start of the spawned workers of one grid."""

    def __init__(self, duty: Duty) -> None:
        if (name := missing_script()) is not None:
            raise FedLPError(
                f"spawned workers import the main script, but {name} is no file; write the script to a file, or set "
                "simulation.workers=0"
            )
        self._spawn, self._duty = multiprocessing.get_context("spawn"), duty
        self._numbers = count()
        self._parcel = Parcel(hand_over_of(duty.load_app))
        self._lifeline = self._spawn.Pipe(duplex=False)

    def selector(self) -> selectors.BaseSelector:
        """Return a selector of ``multiprocessing``'s pipes on every system; those of Windows are no sockets."""
        return PipeSelector(wait)

    def start(self) -> Worker:
        """Start a worker, without waiting for it."""
        duty = self._duty
        block = Block(create=True, size=2 * duty.num_slots * duty.capacity)
        parent, child = self._spawn.Pipe()
        numbers = duty.num_slots, duty.capacity, duty.num_clients
        process = self._spawn.Process(
            target=_run_spawned,
            args=(child, self._lifeline[0], block.name, self._parcel.label, json.dumps(duty.run_config), *numbers),
            name=f"{WORKER_NAME}-{next(self._numbers)}",
            daemon=True,
        )
        with _terminal_signals_wait():
            process.start()
        child.close()
        return Worker(process, parent, _slots(block.memory, duty.num_slots, duty.capacity), block=block)

    def await_ready(self, worker: Worker) -> None:
        """Wait until a worker serves; FedLPError if it cannot."""
        try:
            problem = worker.connection.recv_bytes()
        except (EOFError, OSError):
            worker.process.join(timeout=5)
            raise FedLPError(_why_not_ready(worker.process.exitcode)) from None
        if problem != _READY:
            raise FedLPError(problem.decode())
        if worker.block is not None:  # attached: nothing is left behind, however the processes end
            worker.block.remove()

    def close(self) -> None:
        """Release what workers share; those that still live end."""
        self._parcel.remove()
        for end in self._lifeline:
            end.close()


def _why_not_ready(exitcode: int | None) -> str:
    if exitcode == UNGUARDED:
        return (
            "worker processes import this script, which would start the run again; put the call of fedlp under: "
            'if __name__ == "__main__":'
        )
    return (
        f"a worker process ended before it was ready (exit code {exitcode}); the lines above may say why, else try "
        "fewer simulation.workers, which need less memory"
    )


def _slots(memory: memoryview, num_slots: int, capacity: int) -> list[tuple[Area, Area]]:
    """Return areas in one block of shared memory."""
    areas = [Area(memory[i * capacity : (i + 1) * capacity]) for i in range(2 * num_slots)]
    return list(zip(areas[::2], areas[1::2], strict=True))


@contextmanager
def _terminal_signals_wait() -> Iterator[None]:
    """Block the signals of a terminal: a process started meanwhile never sees them, this one does afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in a spawned worker
def _run_spawned(
    connection: Connection,
    lifeline: Connection,
    block: str,
    label: Label,
    run_config: str,
    num_slots: int,
    capacity: int,
    num_partitions: int,
) -> None:
    _share_no_lock_of_bars()

    def load_node() -> Node:
        """Return the clients' side of the grid, and tell the parent how that went."""
        try:
            node = Node(make_app(open_parcel(label)), json.loads(run_config), num_partitions)
        except FedLPError as error:
            connection.send_bytes(str(error).encode())
            sys.exit(1)
        connection.send_bytes(_READY)
        return node

    serve(connection, _slots(Block(name=block).memory, num_slots, capacity), load_node, lifeline)


def _share_no_lock_of_bars() -> None:
    """Give progress bars a lock of this process alone.

    Theirs is a named semaphore, made even by ``torch.fx`` without a bar, and left behind by a worker that is killed.
    """
    with suppress(ImportError):
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())
