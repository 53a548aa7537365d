"""Start of worker processes: forked, or spawned as fresh interpreters.

A forked worker inherits model, data and parts. A spawned one is given them, once for all workers, in shared memory; it
imports the user's modules itself, and the main script too, as Python's ``multiprocessing`` does.
"""

from __future__ import annotations

import multiprocessing
import os
import selectors
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from flwr.clientapp import ClientApp

from fedlp.errors import ConfigError, FedLPError
from fedlp.simulation.shared_blocks import Block, Label, Parcel, check_room, explain, open_parcel
from fedlp.simulation.transport import Area
from fedlp.simulation.worker import serve
from fedlp.simulation.worker_process import Worker, start_forked

RunSettings = dict[str, bool | float | int | str]

_UNGUARDED = 93  # exit code of a worker whose main script starts a run while it is imported
_NAME = "fedlp-worker"
_READY = b""


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
    if multiprocessing.current_process().name.startswith(_NAME):
        os._exit(_UNGUARDED)


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


def make_starter(
    method: str,
    num_workers: int,
    num_slots: int,
    capacity: int,
    load_app: Callable[[], ClientApp],
    run_config: RunSettings,
    num_clients: int,
) -> Starter:
    """Return the starter of a method, "fork" or "spawn".

    Parameters
    ----------
    num_workers : int
        Workers that live at once.
    num_slots : int
        Tasks that a worker may have waiting, >= 1.
    capacity : int
        Bytes of each area of memory; a slot has two.
    load_app : callable
        Returns the ClientApp; pickled for spawned workers.

    Raises
    ------
    FedLPError
        If spawned workers cannot be given ``load_app``, or there is no room for their messages.
    """
    if method == "fork":
        return _Forking(num_slots, capacity, load_app, run_config, num_clients)
    check_room(num_workers * num_slots * 2 * capacity)
    return _Spawning(num_slots, capacity, load_app, run_config, num_clients)


class _Forking:
    def __init__(
        self,
        num_slots: int,
        capacity: int,
        load_app: Callable[[], ClientApp],
        run_config: RunSettings,
        num_clients: int,
    ) -> None:
        self._fork = multiprocessing.get_context("fork")
        self._about = num_slots, capacity, load_app, run_config, num_clients
        self._lifeline = self._fork.Pipe(duplex=False)

    def selector(self) -> selectors.BaseSelector:
        return selectors.DefaultSelector()

    def start(self) -> Worker:
        return start_forked(self._fork, *self._about, self._lifeline)

    def await_ready(self, worker: Worker) -> None:
        """Do nothing: what a worker inherits is ready."""

    def close(self) -> None:
        for end in self._lifeline:
            end.close()


class _Spawning:
    def __init__(
        self,
        num_slots: int,
        capacity: int,
        load_app: Callable[[], ClientApp],
        run_config: RunSettings,
        num_clients: int,
    ) -> None:
        _check_script()
        self._spawn = multiprocessing.get_context("spawn")
        self._num_slots, self._capacity = num_slots, capacity
        self._about = run_config, num_clients
        self._numbers = count()
        self._parcel = Parcel(load_app)
        self._lifeline = self._spawn.Pipe(duplex=False)

    def selector(self) -> selectors.BaseSelector:
        return _PipeSelector()

    def start(self) -> Worker:
        block = Block(create=True, size=2 * self._num_slots * self._capacity)
        parent, child = self._spawn.Pipe()
        process = self._spawn.Process(
            target=_run_spawned,
            args=(child, block.name, self._num_slots, self._capacity, self._parcel.label, *self._about),
            kwargs={"lifeline": self._lifeline[0]},
            name=f"{_NAME}-{next(self._numbers)}",
            daemon=True,
        )
        with _terminal_signals_wait():
            process.start()
        child.close()
        return Worker(process, parent, _slots(block.memory, self._num_slots, self._capacity), block=block)

    def await_ready(self, worker: Worker) -> None:
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
        self._parcel.remove()
        for end in self._lifeline:
            end.close()


def _check_script() -> None:
    """Raise FedLPError if the main script is one that workers cannot import: it comes from standard input."""
    main = sys.modules["__main__"]
    name = getattr(main, "__file__", None)
    folder = getattr(multiprocessing.process, "ORIGINAL_DIR", None) or ""  # where the program started
    if name is not None and main.__spec__ is None and not Path(folder, name).exists():
        raise FedLPError(f"spawned workers import the main script, but {name} is no file; write the script to a file")


def _why_not_ready(exitcode: int | None) -> str:
    if exitcode == _UNGUARDED:
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
    block: str,
    num_slots: int,
    capacity: int,
    label: Label,
    run_config: RunSettings,
    num_partitions: int,
    lifeline: Connection,
) -> None:
    slots = _slots(Block(name=block).memory, num_slots, capacity)
    serve(connection, slots, lambda: _load(connection, label), run_config, num_partitions, lifeline)


def _load(connection: Connection, label: Label) -> ClientApp:
    """Return the app that the parent handed over, and tell it how that went."""
    try:
        try:
            load_app = open_parcel(label)
        except (AttributeError, ImportError) as error:  # what only exists in the parent
            raise FedLPError(explain(error)) from error
        app: ClientApp = load_app()
    except FedLPError as error:
        connection.send_bytes(str(error).encode())
        sys.exit(1)
    connection.send_bytes(_READY)
    return app


class _PipeSelector(selectors.BaseSelector):
    """Selector of ``multiprocessing``'s pipes on every system; those of Windows are no sockets."""

    def __init__(self) -> None:
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        self._keys[fileobj] = key = selectors.SelectorKey(fileobj, fileobj.fileno(), events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return [(self._keys[pipe], selectors.EVENT_READ) for pipe in wait(list(self._keys), timeout)]

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys
