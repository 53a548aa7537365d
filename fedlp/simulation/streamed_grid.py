"""Flower's Grid over an ordered exchange with the clients of one run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlp.federation import flower_compat
from fedlp.simulation.transport import Item

CRASHED = 8  # Flower's code for a ClientApp whose process died


class StreamedGrid(Grid):
    """Grid whose replies come in the order of messages, from nodes that all hold the test set.

    Parameters
    ----------
    num_clients : int
        Nodes; node ``i + 1`` is the client of partition ``i``.
    """

    holds_test_set = True

    def __init__(self, num_clients: int) -> None:
        flower_compat.become_server()
        self._num_clients = num_clients
        self._stamped = 0
        self._replies: dict[str, Message] = {}

    @abstractmethod
    def __enter__(self) -> Self:
        """Return the grid."""

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""

    @abstractmethod
    def stream(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Yield one reply per message, in order.

        Parameters
        ----------
        timeout : float
            Seconds of work on one message, after which its reply is an error.
        """

    def _stamp(self, message: Message) -> Item:
        """Number a message; return what travels for it."""
        self._stamped += 1
        flower_compat.set_message_id(message, str(self._stamped))
        about = {
            "message_id": message.metadata.message_id,
            "node_id": message.metadata.dst_node_id,
            "type": message.metadata.message_type,
            "group_id": message.metadata.group_id,
        }
        return about, message.content

    def set_run(self, run: flower_compat.Run) -> None:
        """Do nothing: there is only one run."""

    @property
    def run(self) -> flower_compat.Run:
        """Empty description: no SuperLink knows this run."""
        return flower_compat.make_run()

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return range(1, self._num_clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages and keep their replies for :meth:`pull_messages`."""
        ids = []
        for reply in self.stream(messages, timeout=float("inf")):
            ids.append(reply.metadata.reply_to_message_id)
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, each once."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the replies to all messages, in order."""
        return list(self.stream(messages, float("inf") if timeout is None else timeout))
