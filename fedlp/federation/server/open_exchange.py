"""Open exchange: messages are sent at any time, replies are taken as they come, in any order.

A reply that comes twice, after its deadline, or to no message of this exchange is not read.
"""

from __future__ import annotations

import time

from flwr.app import Message
from flwr.serverapp import Grid

from fedlp.federation.server.exchange import Postbox, StreamingGrid, no_reply

_POLL_S = 0.2


class OpenExchange:
    """Messages in flight on a grid, each with a deadline.

    Parameters
    ----------
    timeout : float
        Seconds from sending, after which a missing reply becomes an error reply.
    """

    def __init__(self, grid: Grid, timeout: float) -> None:
        self._postbox, self._timeout = Postbox(grid, waits=False), timeout
        self._deadlines: dict[int, tuple[float, Message]] = {}
        self._rest_s = 0.0 if isinstance(grid, StreamingGrid) else _POLL_S  # a grid of this process waits by itself

    def send(self, messages: list[Message]) -> None:
        """Send messages, without waiting for replies."""
        self._postbox.send(messages, self._timeout)
        deadline = time.monotonic() + self._timeout
        self._deadlines |= {id(message): (deadline, message) for message in messages}

    def take(self) -> list[tuple[Message, Message]]:
        """Return the messages answered since the last call, each with its reply; wait a moment if there are none."""
        found = self._postbox.collect()
        for message, _ in found:
            del self._deadlines[id(message)]
        now = time.monotonic()
        for key, (deadline, message) in list(self._deadlines.items()):
            if deadline <= now:
                del self._deadlines[key]
                self._postbox.forget(message)
                found.append((message, no_reply(message, self._timeout)))
        if not found:
            time.sleep(self._rest_s)
        return found
