"""Clients in the server's own process, one after another: for debuggers, and models that no other process can build.

Messages take the same way as to a worker process, through the same frames and areas of memory.
"""

from __future__ import annotations

import selectors
from collections import deque
from collections.abc import Callable, Sequence

import torch

from fedlp.simulation.pipe_selector import PipeSelector
from fedlp.simulation.worker import STOP
from fedlp.simulation.worker_process import Duty, Worker
from fedlp.training.threads import one_thread


class InProcess:
    """Start of the one worker that is no process."""

    def __init__(self, duty: Duty) -> None:
        self._duty = duty

    def selector(self) -> selectors.BaseSelector:
        """Return a selector of replies."""
        return PipeSelector(_answered)

    def start(self) -> Worker:
        """Return a worker that answers while it is sent messages."""
        slots, node = self._duty.make_slots(), self._duty.load_node()

        def answer(frame: bytes) -> bytes:
            with one_thread(), torch.random.fork_rng(devices=[]):  # as in a process of its own
                return node.answer(frame, slots)

        return Worker(_NoProcess(), _Loop(answer), slots)

    def await_ready(self, worker: Worker) -> None:
        """Do nothing: it is ready."""

    def close(self) -> None:
        """Do nothing: nothing is shared."""


class _NoProcess:
    exitcode = None

    def join(self, timeout: float | None = None) -> None:
        """Do nothing: the worker ends with its last answer."""

    def kill(self) -> None:
        """Do nothing: what was late has ended already."""


class _Loop:
    """Pipe to nowhere: a frame is answered while it is sent."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer
        self.replies: deque[bytes] = deque()

    def send_bytes(self, frame: bytes) -> None:
        if frame != STOP:
            self.replies.append(self._answer(frame))

    def recv_bytes(self) -> bytes:
        return self.replies.popleft()

    def close(self) -> None:
        self.replies.clear()


def _answered(pipes: Sequence[_Loop], timeout: float | None) -> list[_Loop]:
    """Return the pipes with replies; none once the time is over, so that a late answer counts as no reply."""
    is_late = timeout is not None and timeout <= 0
    return [] if is_late else [pipe for pipe in pipes if pipe.replies]
