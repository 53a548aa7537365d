"""Message exchange: replies in the order of sending, as early as possible.

A reply is passed on once all earlier ones are, so that the server aggregates while clients still train, and
always in the same order. A client that is silent until the deadline gets an error reply in its place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedlp.errors import printable
from fedlp.federation.server.reply_polling import Puller

log = logging.getLogger("fedlp")

NO_REPLY, GONE = 3, 5  # Flower's codes for a message that is unavailable, and for such a node
SURPLUS, LATE, LEFT = 1000, 1001, 1002  # our own: enough others have answered; a virtual clock
_KINDS = {2: "raised", NO_REPLY: "no_reply", GONE: "gone", 8: "crashed"}
_OWN_KINDS = {SURPLUS: "surplus", LATE: "late", LEFT: "left"}
_POLL_S = 0.2
_ATTEMPTS = 3


class OwnError(Error):
    """Error that the server itself puts in place of a reply; a client's with the same code is none."""


@runtime_checkable
class StreamingGrid(Protocol):
    """Grid with its own ordered exchange, which pulls messages only as fast as it can use them."""

    def stream(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Yield one reply per message, in order."""


class Postbox:
    """Messages in flight, and received replies.

    Parameters
    ----------
    waits : bool
        Whether a :class:`StreamingGrid` answers within :meth:`send`; else its workers answer meanwhile.
    """

    def __init__(self, grid: Grid, waits: bool = True) -> None:
        self._grid, self._streams = grid, grid if waits and isinstance(grid, StreamingGrid) else None
        is_here = isinstance(grid, StreamingGrid)
        self._pull: Callable[[list[str]], Iterable[Message]] = grid.pull_messages if is_here else Puller(grid).pull
        self._waiting: dict[str, Message] = {}
        self._answered: list[tuple[Message, Message]] = []

    @property
    def is_waiting(self) -> bool:
        """Whether replies are outstanding."""
        return bool(self._waiting)

    def send(self, messages: list[Message], timeout: float) -> None:
        """Send messages; a :class:`StreamingGrid` may answer within the call, up to ``timeout`` seconds a message."""
        if self._streams is not None:
            self._answered += zip(messages, self._streams.stream(messages, timeout), strict=True)
            return
        for message_id, message in zip(self._grid.push_messages(messages) if messages else (), messages, strict=True):
            if message_id:
                self._waiting[message_id] = message
            else:  # Flower does not take what is for a node that it does not know any more
                self._answered.append((message, Message(Error(GONE, "no such node"), reply_to=message)))

    def collect(self) -> list[tuple[Message, Message]]:
        """Return the messages answered since the last call, each with its reply."""
        answered, self._answered = self._answered, []
        for reply in self._pull(list(self._waiting)) if self._waiting else ():
            if (message := self._waiting.pop(reply.metadata.reply_to_message_id, None)) is not None:
                answered.append((message, reply))
        return answered

    def forget(self, message: Message) -> None:
        """Read no reply to a message any more."""
        self._waiting = {key: waiting for key, waiting in self._waiting.items() if waiting is not message}


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
    sent, postbox = list(messages), Postbox(grid)
    deadline = time.monotonic() + timeout
    postbox.send(sent, timeout)
    arrived: dict[int, Message] = {}
    for message in sent:
        while id(message) not in arrived and time.monotonic() < deadline:
            arrived |= {id(answered): reply for answered, reply in postbox.collect()}
            if id(message) not in arrived:
                time.sleep(_POLL_S)
        yield arrived.pop(id(message)) if id(message) in arrived else no_reply(message, timeout)


def exchange_first(
    grid: Grid, messages: Iterable[Message], timeout: float, enough: int, order: Callable[[int], Iterable[int]]
) -> Iterator[Message]:
    """Yield one reply per message, in the order of ``messages``; replies beyond the first good ones become errors.

    On a network the first are the fastest. On a :class:`StreamingGrid`, whose workers do not model
    devices, they are the first in a given order, and only as many work as needed.

    Parameters
    ----------
    enough : int
        Good replies that end the wait.
    order : callable
        Returns the order in which a number of messages would be answered.
    """
    sent = list(messages)
    streams = isinstance(grid, StreamingGrid)
    find = _first_in_order if streams else _first_to_answer
    replies = find(grid, sent, timeout, enough, list(order(len(sent))))  # type: ignore[arg-type]
    good = sum(not reply.has_error() for reply in replies.values())
    for number, message in enumerate(sent):
        if number in replies:
            yield replies[number]
        elif good >= enough:
            yield Message(OwnError(SURPLUS, f"{enough} others were first"), reply_to=message)
        else:
            yield no_reply(message, timeout)


def _first_in_order(
    grid: StreamingGrid, sent: Sequence[Message], timeout: float, enough: int, order: list[int]
) -> dict[int, Message]:
    """Return the first good replies by number of the message, and the errors before them."""
    replies: dict[int, Message] = {}
    good = 0
    while order and good < enough:
        batch, order = sorted(order[: enough - good]), order[enough - good :]
        for number, reply in zip(batch, grid.stream((sent[number] for number in batch), timeout), strict=True):
            replies[number] = reply
            good += not reply.has_error()
    return replies


def _first_to_answer(
    grid: Grid, sent: Sequence[Message], timeout: float, enough: int, _: list[int]
) -> dict[int, Message]:
    """Return the first good replies by number of the message, and the errors that came before them."""
    postbox, numbers = Postbox(grid), {id(message): number for number, message in enumerate(sent)}
    deadline = time.monotonic() + timeout
    postbox.send(list(sent), timeout)
    replies: dict[int, Message] = {}
    good = 0
    while True:
        for message, reply in postbox.collect():
            if reply.has_error() or good < enough:
                replies[numbers[id(message)]] = reply
                good += not reply.has_error()
        if good >= enough or len(replies) == len(sent) or time.monotonic() >= deadline:
            return replies
        time.sleep(_POLL_S)


def exchange_again(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
    """Yield one reply per message, in the order of ``messages``; failed ones are resent, up to twice, to other nodes.

    For requests that any node can answer. An error reply is that of the last attempt.

    Parameters
    ----------
    timeout : float
        Deadline of each attempt.
    """
    sent, nodes = list(messages), node_ids(grid)
    replies = list(exchange(grid, sent, timeout))
    for attempt in range(1, _ATTEMPTS):
        failed = [number for number, reply in enumerate(replies) if reply.has_error()]
        for number in failed:
            was, sent[number] = sent[number], _address(sent[number], nodes[(number + attempt) % len(nodes)])
            about, reason = was.metadata, reason_of(replies[number])
            log.warning("%s failed at node %d (%s); it is tried again", about.message_type, about.dst_node_id, reason)
        for number, reply in zip(failed, exchange(grid, [sent[number] for number in failed], timeout), strict=True):
            replies[number] = reply
    yield from replies


def node_ids(grid: Grid) -> Sequence[int]:
    """Return the nodes of a grid; a range as it is, which costs nothing to keep, compare and search."""
    found = grid.get_node_ids()
    return found if isinstance(found, range) else list(found)


def _address(message: Message, node_id: int) -> Message:
    """Return a message of the same content to another node."""
    about = message.metadata
    return Message(message.content, node_id, about.message_type, ttl=about.ttl, group_id=about.group_id)


def reason_of(reply: Message) -> str:
    """Return the reason of an error reply, in one printable line."""
    return printable(reply.error.reason or "") or "no reason given"


def kind_of(error: Error) -> str:
    """Return the kind of an error reply, as on record."""
    kinds = _OWN_KINDS if isinstance(error, OwnError) else _KINDS
    return kinds.get(error.code, "error")


def no_reply(message: Message, timeout: float) -> Message:
    """Return the error reply of a silent client."""
    return Message(Error(NO_REPLY, f"no reply within {timeout:g} s"), reply_to=message)
