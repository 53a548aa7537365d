"""Flower's Grid over an ordered exchange with the clients of one run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlp.federation import flower_compat
from fedlp.federation.server.roster import Profiles
from fedlp.simulation.transport import Item

CRASHED = 8  # Flower's code for a ClientApp whose process died
PULL_S = 0.05  # that a pull waits for a reply


class StreamedGrid(Grid):
    """Grid whose nodes all hold the test set.

    Replies to a stream come in the order of messages; those to messages that are pushed come as workers give them.

    Parameters
    ----------
    num_clients : int
        Nodes; node ``i + 1`` is the client of partition ``i``.
    profiles : callable, optional
        Returns the profiles of all clients; without it, nodes are asked.
    """

    holds_test_set = True

    def __init__(self, num_clients: int, profiles: Callable[[], Profiles] | None = None) -> None:
        flower_compat.become_server()
        self._num_clients, self._profiles = num_clients, profiles
        self._stamped = 0

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

    def _number(self, message: Message) -> int:
        """Return a number of a message's own, which becomes its id."""
        self._stamped += 1
        flower_compat.set_message_id(message, str(self._stamped))
        return self._stamped

    @staticmethod
    def _item(message: Message) -> Item:
        """Return the frame of a numbered message."""
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

    def profiles(self) -> Profiles:
        """Return the profiles of all nodes; none where nodes must be asked."""
        return {} if self._profiles is None else self._profiles()

    @abstractmethod
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages for workers, which may take the time to live of each."""

    @abstractmethod
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come to these messages, each once; wait a moment for one."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the replies to all messages, in order."""
        return list(self.stream(messages, float("inf") if timeout is None else timeout))
