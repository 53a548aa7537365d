"""A worker process: one torch thread, one ClientApp, one message after another until the pipe closes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlp.errors import FedLPError
from fedlp.simulation import flower_compat
from fedlp.simulation.transport import Area, decode_frame, encode_frame

STOP = b"\xff"
RAISED = 2  # Flower's code for a ClientApp that raised

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def serve(
    connection: Connection,
    slots: Sequence[tuple[Area, Area]],
    load_app: Callable[[], ClientApp],
    run_config: dict[str, bool | float | int | str],
    num_partitions: int,
    lifeline: int,
) -> None:
    """Answer messages until the other end closes.

    Parameters
    ----------
    slots : sequence of (down, up)
        Shared memory for the arrays of a message and of its reply.
    lifeline : int
        Read end of a pipe whose write end only the parent holds.
    """
    end_with_parent(lifeline)
    heed_signals()
    settle_process()
    flower_compat.become_server()
    app = load_app()
    while True:
        try:
            frame = connection.recv_bytes()
        except (EOFError, OSError):
            return  # the parent is gone
        if frame == STOP:
            return
        slot = frame[0]
        down, up = slots[slot]
        about, content = decode_frame(frame[1:], down, flower_compat.make_array)
        node_id = about["node_id"]
        context = Context(
            run_id=flower_compat.RUN_ID,
            node_id=node_id,
            node_config={"partition-id": node_id - 1, "num-partitions": num_partitions},
            state=RecordDict(),
            run_config=run_config,
        )
        message = flower_compat.make_instruction(
            content or RecordDict(), about["message_id"], node_id, about["type"], about["group_id"]
        )
        reply, error = _answer(app, message, context)
        try:
            answer = encode_frame({"error": error}, reply, up)
        except FedLPError as failure:  # a reply that is larger than its slot
            answer = encode_frame({"error": [RAISED, str(failure)]}, None, up)
        try:
            connection.send_bytes(frame[:1] + answer)
        except OSError:
            return


def _answer(app: ClientApp, message: Message, context: Context) -> tuple[RecordDict | None, list[object] | None]:
    """Return the reply's records, or an error code and reason: an exception of a client must not end the run."""
    try:
        reply = app(message, context)
        if reply.has_error():
            return None, [reply.error.code, reply.error.reason]
        return reply.content, None
    except Exception as error:
        text = str(error).strip().splitlines()
        return None, [RAISED, f"{type(error).__name__}: {text[0] if text else 'no message'}"]


def end_with_parent(lifeline: int) -> None:
    """End this process at once when its parent ends, even within a step.

    Linux kills it; elsewhere, and if the parent ended first, a thread sees the closed pipe.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        os.read(lifeline, 1)  # nobody writes
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
