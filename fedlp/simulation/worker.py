"""A worker process: one torch thread, one ClientApp, one message after another until the pipe closes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlp.errors import FedLPError
from fedlp.federation import flower_compat
from fedlp.federation.client.cohort_app import CohortApp, attempt
from fedlp.federation.wire.messages import TRAIN
from fedlp.federation.wire.packing import placed_in
from fedlp.simulation.transport import Area, Item, Memory, decode_frame, encode_frame

STOP = b"\xff"
RAISED = 2  # Flower's code for a ClientApp that raised

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


Slots = Sequence[tuple[Area, Area]]
"""Shared memory for the arrays of a message and of its reply, several times."""

RunSettings = dict[str, bool | float | int | str]


@dataclass(frozen=True)
class Node:
    """The clients' side of a grid: their app, and what each finds in its context.

    Attributes
    ----------
    run_config : dict
        Content of ``Context.run_config``.
    num_partitions : int
        Clients; node ``i + 1`` is that of partition ``i``.
    """

    app: ClientApp
    run_config: RunSettings
    num_partitions: int

    def answer(self, frame: bytes, slots: Slots) -> bytes:
        """Return the replies to a frame of messages; both frames begin with the number of their slot."""
        return frame[:1] + self.reply(frame[1:], *slots[frame[0]])

    def reply(self, frame: bytes, down: Memory, up: Memory) -> bytes:
        """Return the frame of the replies to a frame of messages, whose large arrays are in ``down`` and ``up``."""
        items = decode_frame(frame, down, flower_compat.make_array)
        with placed_in(up.begin()):
            answers = _answer(self.app, [self._receive(about, content) for about, content in items])
        try:
            return encode_frame(answers, up)
        except FedLPError as failure:  # replies that are larger than their slot
            return encode_frame([({"error": [RAISED, str(failure)]}, None)] * len(answers), up)

    def _receive(self, about: dict[str, Any], content: RecordDict | None) -> tuple[Message, Context]:
        """Return a message as its node receives it."""
        node_id = about["node_id"]
        context = Context(
            run_id=flower_compat.RUN_ID,
            node_id=node_id,
            node_config={"partition-id": node_id - 1, "num-partitions": self.num_partitions},
            state=RecordDict(),
            run_config=self.run_config,
        )
        about_it = about["message_id"], node_id, about["type"], about["group_id"]
        return flower_compat.make_instruction(content or RecordDict(), *about_it), context


def serve(connection: Connection, slots: Slots, load_node: Callable[[], Node], lifeline: Connection) -> None:
    """Answer messages until the other end closes.

    Parameters
    ----------
    lifeline : Connection
        Read end of a pipe whose write end only the parent holds.
    """
    end_with_parent(lifeline)
    heed_signals()
    settle_process()
    flower_compat.become_server()
    node = load_node()
    while True:
        try:
            frame = connection.recv_bytes()
        except (EOFError, OSError):
            return  # the parent is gone
        if frame == STOP:
            return
        reply = node.answer(frame, slots)
        try:
            connection.send_bytes(reply)
        except OSError:
            return


def _answer(app: ClientApp, received: Sequence[tuple[Message, Context]]) -> list[Item]:
    """Return the reply to each message; training messages that came together are answered together."""
    together = all(message.metadata.message_type == TRAIN for message, _ in received)
    if len(received) > 1 and together and isinstance(app, CohortApp):
        replies = attempt(app.train_cohort, received)
        if not isinstance(replies, Exception):  # else each client says by itself what is wrong
            return [_encode(reply) for reply in replies]
    return [_encode(attempt(lambda pair: app(*pair), pair)) for pair in received]


def _encode(reply: Message | Exception) -> Item:
    """Return a reply's records, or an error code and reason: an exception of a client must not end the run."""
    if isinstance(reply, Exception):
        text = str(reply).strip().splitlines()
        return {"error": [RAISED, f"{type(reply).__name__}: {text[0] if text else 'no message'}"]}, None
    if reply.has_error():
        return {"error": [reply.error.code, reply.error.reason]}, None
    return {"error": None}, reply.content


def end_with_parent(lifeline: Connection) -> None:
    """End this process at once when its parent ends, even within a step.

    Linux kills it; elsewhere, and if the parent ended first, a thread sees the closed pipe.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        with suppress(EOFError, OSError):
            lifeline.recv_bytes()  # nobody writes
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def heed_signals() -> None:
    """Ignore signals that a terminal sends to all processes of a command, and end at once on SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def settle_process() -> None:
    """Use one torch thread, and keep freed memory."""
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Keep freed memory in this process instead of handing large blocks back to the kernel.

    glibc returns freed activations and messages to the kernel, which then zeroes the same pages again for the next step
    or message; keeping them makes a training step of a small CNN about a tenth faster, and a copy of a 45 MB model ten
    times as fast. Has no effect where the C library is not glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
                mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # the most that older versions of glibc accept
            mallopt(_M_TRIM_THRESHOLD, 1 << 30)
