"""Roster of clients: every node is asked once for its profile, before the first round or when it appears."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlp.errors import FedLPError, ProtocolError
from fedlp.federation.server.exchange import Postbox, node_ids, reason_of
from fedlp.federation.wire import messages
from fedlp.types import Budget, ClientProfile

log = logging.getLogger("fedlp")

_POLL_S = 0.5
_MOST_NAMES = 10


Profiles = Mapping[int, ClientProfile]
"""Profiles by node."""


@runtime_checkable
class KnowingGrid(Protocol):
    """Grid that holds its clients' data, and may know their profiles without a message to each."""

    def profiles(self) -> Profiles:
        """Return the profiles of nodes that need not be asked."""


class Roster:
    """Clients by their stable id, and their nodes, whose ids are random in every run.

    A client whose node is gone stays on the roster, so that draws depend on joined clients alone.

    Parameters
    ----------
    num_clients : int
        Clients to wait for; ids are in [0, num_clients).
    min_clients : int, optional
        Fewest clients to begin with after the deadline; all if absent.
    """

    def __init__(self, num_clients: int, min_clients: int | None = None) -> None:
        self._num_clients = num_clients
        self._min_clients = num_clients if min_clients is None else max(1, min_clients)
        self._profiles: dict[int, ClientProfile] = {}
        self._nodes: dict[int, int] = {}
        self._asked: set[int] = set()
        self._failed: set[int] = set()  # nodes that cannot say who they are, or cannot take part
        self._rivals: dict[int, ClientProfile] = {}  # nodes that say they are a client which another node is
        self._postbox: Postbox | None = None
        self._there: Sequence[int] = ()  # nodes at the last refresh
        self._sorted: tuple[list[int], list[int]] | None = None  # clients with and without examples, if still right

    @property
    def client_ids(self) -> list[int]:
        """Ids of joined clients with examples, sorted. Not to be modified."""
        return self._sort()[0]

    @property
    def idle_ids(self) -> list[int]:
        """Ids of joined clients without examples, sorted; they are never sampled. Not to be modified."""
        return self._sort()[1]

    def absent(self, present: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return the clients that cannot be sampled, by reason."""
        joined = self.client_ids
        found = {
            "unavailable": tuple(sorted({*joined} - {*present})) if len(joined) > len(present) else (),
            "no_data": tuple(self.idle_ids),
        }
        return {reason: client_ids for reason, client_ids in found.items() if client_ids}

    def _sort(self) -> tuple[list[int], list[int]]:
        if self._sorted is None:
            ids = sorted(self._profiles)
            with_examples = [i for i in ids if self._profiles[i].num_examples]
            self._sorted = with_examples, [i for i in ids if not self._profiles[i].num_examples]
        return self._sorted

    def node(self, client_id: int) -> int:
        """Return the node of a client."""
        return self._nodes[client_id]

    def profile(self, client_id: int) -> ClientProfile:
        """Return the profile of a client."""
        return self._profiles[client_id]

    @property
    def budgets(self) -> dict[int, Budget]:
        """Budgets from devices, by client id."""
        found = {client_id: self._profiles[client_id].budget for client_id in self.client_ids}
        return {client_id: budget for client_id, budget in found.items() if budget is not None}

    def join(self, grid: Grid, timeout: float) -> None:
        """Ask nodes as they appear, until all expected clients have answered, or the deadline.

        A node with an invalid or error reply is named and left out; the run goes on without it.

        Parameters
        ----------
        timeout : float
            Deadline in seconds.

        Raises
        ------
        FedLPError
            If too few clients have joined by then, or none can take part.
        """
        deadline = time.monotonic() + timeout
        while True:
            for _ in self.refresh(grid, timeout):
                pass
            if self._is_complete:
                break
            if time.monotonic() > deadline:
                self._begin_with_some(timeout)
                break
            time.sleep(_POLL_S)
        if not self._profiles:
            raise FedLPError(f"none of the {len(self._failed)} clients can take part; the lines above say why")
        if not self.client_ids:
            raise FedLPError(f"none of the {len(self._profiles)} clients has examples; give them data")
        if idle := self.idle_ids:
            names = _names(idle)
            log.warning(
                "%d of %d clients have no examples and are not sampled: %s", len(idle), len(self._profiles), names
            )

    def refresh(self, grid: Grid, timeout: float) -> Iterator[int]:
        """Ask new nodes, and yield the clients that joined, or returned at another node, one by one.

        On a network there is no wait: late answers count at the next call.

        Parameters
        ----------
        timeout : float
            Deadline of an answer in seconds.
        """
        if self._postbox is None:
            self._postbox = Postbox(grid)
        there = node_ids(grid)
        if there == self._there and not self._rivals and not self._postbox.is_waiting:
            return  # so that a round of a large federation costs next to nothing here
        self._there = there
        self._forget_all_but({*there, *self._nodes.values()})
        new = [node for node in there if node not in self._asked]
        self._asked.update(new)
        known = grid.profiles() if new and isinstance(grid, KnowingGrid) else {}
        told = {node: known[node] for node in new if node in known}
        asked = [Message(RecordDict(), node, messages.CAPABILITIES, ttl=timeout) for node in new if node not in told]
        self._postbox.send(asked, timeout)
        for node, profile in [*self._rivals.items(), *told.items(), *self._answers(self._postbox)]:
            client_id = profile.client_id
            holder = self._nodes.get(client_id, node)
            if holder == node or holder not in there:
                self._rivals.pop(node, None)
                self._profiles[client_id], self._nodes[client_id] = profile, node
                self._sorted = None
                yield client_id
            elif node not in self._rivals:
                self._rivals[node] = profile
                log.warning(
                    "node %d cannot take part: it says it is client %d, which node %d is", node, client_id, holder
                )

    def dismiss(self, client_id: int, error: FedLPError) -> None:
        """Remove a client that cannot take part, until its node leaves and returns."""
        del self._profiles[client_id]
        self._sorted = None
        self._refuse(self._nodes.pop(client_id), error)

    @property
    def _is_complete(self) -> bool:
        """Whether all expected clients have joined."""
        joined = len(self._profiles)
        is_waiting = self._postbox is not None and self._postbox.is_waiting
        return joined == self._num_clients or (not is_waiting and joined + len(self._failed) >= self._num_clients)

    def _begin_with_some(self, timeout: float) -> None:
        """Log the missing clients if enough have joined; else raise."""
        missing = [client_id for client_id in range(self._num_clients) if client_id not in self._profiles]
        if len(self._profiles) < self._min_clients:
            raise FedLPError(
                f"{len(self._profiles)} of num_clients={self._num_clients} clients joined within {timeout:g} s, and it "
                f"takes {self._min_clients} to begin; start the others, or lower num_clients or min_clients"
            )
        log.warning(
            "the run begins without %d of %d clients, which did not join within %g s: %s",
            len(missing),
            self._num_clients,
            timeout,
            _names(missing),
        )

    def _forget_all_but(self, nodes: set[int]) -> None:
        """Forget nodes that are gone, so that they are asked again on return."""
        self._asked &= nodes
        self._failed &= nodes
        self._rivals = {node: profile for node, profile in self._rivals.items() if node in nodes}

    def _answers(self, postbox: Postbox) -> Iterator[tuple[int, ClientProfile]]:
        """Yield the profiles of nodes."""
        for query, reply in postbox.collect():
            node = query.metadata.dst_node_id
            try:
                if reply.has_error():
                    raise ProtocolError(reason_of(reply))
                profile = messages.decode_profile(reply.content)
                if profile.client_id >= self._num_clients:
                    raise ProtocolError(f"it says it is client {profile.client_id}; num_clients={self._num_clients}")
            except ProtocolError as error:
                self._refuse(node, error)
            else:
                yield node, profile

    def _refuse(self, node: int, error: FedLPError) -> None:
        self._failed.add(node)
        log.warning("node %d cannot take part: %s", node, error)


def _names(client_ids: Sequence[int]) -> str:
    return ", ".join(map(str, client_ids[:_MOST_NAMES])) + (", ..." if len(client_ids) > _MOST_NAMES else "")
