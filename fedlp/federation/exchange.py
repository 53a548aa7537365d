"""Send messages, get their replies back in the order of sending, as early as possible.

A reply is handed on as soon as all earlier ones are, so that the server can aggregate while clients still train and yet
always adds in the same order. Whoever stays silent until the deadline is answered for with an error reply.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from flwr.app import Error, Message
from flwr.serverapp import Grid

NO_REPLY = 3  # Flower's code for a message that is unavailable
_POLL_S = 0.2


@runtime_checkable
class StreamingGrid(Protocol):
    """A grid that does the ordered exchange itself and pulls messages only as fast as it can use them."""

    def stream(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Yield one reply per message, in order."""


def exchange(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
    """Yield one reply per message, in the order of ``messages``.

    Parameters
    ----------
    timeout : float
        Seconds from sending, after which missing replies become error replies.
    """
    if isinstance(grid, StreamingGrid):
        yield from grid.stream(messages, timeout)
        return
    sent = list(messages)
    deadline = time.monotonic() + timeout
    ids = list(grid.push_messages(sent))
    waiting = dict(zip(ids, sent, strict=True))
    arrived: dict[str, Message] = {}
    for message_id, message in zip(ids, sent, strict=True):
        while message_id not in arrived and time.monotonic() < deadline:
            for reply in grid.pull_messages(list(waiting)):
                key = reply.metadata.reply_to_message_id
                if waiting.pop(key, None) is not None:
                    arrived[key] = reply
            if message_id not in arrived:
                time.sleep(_POLL_S)
        if message_id in arrived:
            yield arrived.pop(message_id)
        else:
            yield no_reply(message, timeout)


def reason_of(reply: Message) -> str:
    """Return why a reply is an error, in one line."""
    return (reply.error.reason or "no reason given").strip().splitlines()[0]


def no_reply(message: Message, timeout: float) -> Message:
    """Return the error reply that stands for silence."""
    return Message(Error(NO_REPLY, f"no reply within {timeout:g} s"), reply_to=message)
