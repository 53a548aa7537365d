"""Calls that can wait in the middle: each in a thread of its own, of which one at a time runs."""

from __future__ import annotations

from collections.abc import Callable
from threading import Semaphore, Thread
from typing import Any

import torch


class _Closed(BaseException):
    """Signal that a waiting call is given up."""


class PausedCall:
    """Call that runs until it waits or ends; caller and callee never run at the same time.

    Parameters
    ----------
    call : callable
        Receives a function that pauses it until :meth:`resume`. It runs without gradients and with as many torch
        threads as the caller.
    """

    def __init__(self, call: Callable[[Callable[[], None]], Any]) -> None:
        self.is_done, self.result = False, None
        self._call, self._num_threads = call, torch.get_num_threads()
        self._go, self._stopped = Semaphore(0), Semaphore(0)
        self._error: BaseException | None = None
        self._is_closed = False
        self._thread = Thread(target=self._run, daemon=True)

    def resume(self) -> bool:
        """Run until the call waits, or ends: then return True. What it raises is raised here."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self.is_done

    def close(self) -> None:
        """Give up a waiting call; idempotent."""
        if self._thread.ident is not None and not self.is_done:
            self._is_closed = True
            self._go.release()
            self._thread.join()

    def _wait(self) -> None:
        self._stopped.release()
        self._go.acquire()
        if self._is_closed:
            raise _Closed

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._num_threads)  # a thread begins with the machine's number
            with torch.no_grad():
                self.result = self._call(self._wait)
        except _Closed:
            pass
        except BaseException as error:  # raised again by resume
            self._error = error
        self.is_done = True
        self._stopped.release()
