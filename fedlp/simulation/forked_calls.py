"""Calls of one function in forked processes, which inherit it: JSON values go through pipes, and nothing is pickled."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from fedlp.errors import FedLPError, one_line
from fedlp.simulation.starting import start_method
from fedlp.simulation.worker import end_with_parent, heed_signals, settle_process

Function = Callable[[Any], Any]
"""Takes a JSON value and returns one."""


class ForkedCalls:
    """Worker processes that call a function; a context manager.

    Where the system cannot fork, or with one worker, the function is called in this process. Results do not depend on
    the number of workers, if those of the function depend on its argument alone.

    Parameters
    ----------
    num_workers : int
        Processes, >= 1.
    """

    def __init__(self, function: Function, num_workers: int) -> None:
        self._function = function
        self._workers: dict[Connection, BaseProcess] = {}
        if num_workers == 1 or start_method("auto") != "fork":
            return
        fork = multiprocessing.get_context("fork")
        self._lifeline = fork.Pipe(duplex=False)
        for _ in range(num_workers):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=_serve, args=(function, ours, theirs, self._lifeline), daemon=True)
            process.start()
            theirs.close()
            self._workers[ours] = process

    def __enter__(self) -> ForkedCalls:
        return self

    def __exit__(self, *_: object) -> None:
        """End the worker processes."""
        for connection, process in self._workers.items():
            process.kill()
            process.join()
            connection.close()
        if self._workers:
            for end in self._lifeline:
                end.close()
        self._workers = {}

    def map(self, values: Sequence[Any]) -> list[Any]:
        """Return the function's value of each, in their order.

        Raises
        ------
        FedLPError
            If a call raises in a worker process, or a worker ends.
        """
        if not self._workers:
            return [self._function(value) for value in values]
        found: list[Any] = [None] * len(values)
        waiting = list(enumerate(values))[::-1]
        busy: dict[Connection, int] = {}
        free = list(self._workers)
        while waiting or busy:
            while waiting and free:
                connection = free.pop()
                busy[connection], value = waiting.pop()
                self._send(connection, value)
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                found[busy.pop(ready)] = self._receive(ready)
                free.append(ready)
        return found

    def _send(self, connection: Connection, value: Any) -> None:
        try:
            connection.send_bytes(json.dumps(value).encode())
        except OSError as error:
            raise self._lost(connection) from error

    def _receive(self, connection: Connection) -> Any:
        try:
            reply = json.loads(connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._lost(connection) from error
        if "error" in reply:
            raise FedLPError(reply["error"])
        return reply["value"]

    def _lost(self, connection: Connection) -> FedLPError:
        process = self._workers[connection]
        process.join(timeout=5)
        return FedLPError(
            f"a worker process ended (exit code {process.exitcode}); try fewer workers, which need less memory"
        )


# ---- in a worker
def _serve(function: Function, theirs: Connection, ours: Connection, lifeline: tuple[Connection, Connection]) -> None:
    """Answer calls until the parent ends."""
    theirs.close()
    lifeline[1].close()
    end_with_parent(lifeline[0])
    heed_signals()
    settle_process()
    while True:
        try:
            ours.send_bytes(json.dumps(_call(function, json.loads(ours.recv_bytes()))).encode())
        except (EOFError, OSError):
            return  # the parent is gone


def _call(function: Function, value: Any) -> dict[str, Any]:
    try:
        return {"value": function(value)}
    except FedLPError as error:
        return {"error": str(error)}
    except Exception as error:  # a defect ends the whole search, with its name
        return {"error": f"a worker process failed: {type(error).__name__}: {one_line(error)}"}
