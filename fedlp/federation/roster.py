"""Who takes part: every node is asked once who it is, before the first round."""

from __future__ import annotations

import logging
import time

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlp.errors import FedLPError, ProtocolError
from fedlp.federation import messages
from fedlp.federation.exchange import exchange, reason_of
from fedlp.types import Budget, ClientProfile

log = logging.getLogger("fedlp")

_POLL_S = 0.5


class Roster:
    """Clients by their own id, which is stable, and the nodes they are reached at, which are random in every run.

    Parameters
    ----------
    num_clients : int
        Clients to wait for; ids are in [0, num_clients).
    """

    def __init__(self, num_clients: int) -> None:
        self._num_clients = num_clients
        self._profiles: dict[int, ClientProfile] = {}
        self._nodes: dict[int, int] = {}

    @property
    def client_ids(self) -> list[int]:
        """All clients that joined, sorted."""
        return sorted(self._profiles)

    def node(self, client_id: int) -> int:
        """Return the node of a client."""
        return self._nodes[client_id]

    def profile(self, client_id: int) -> ClientProfile:
        """Return what a client said of itself."""
        return self._profiles[client_id]

    @property
    def budgets(self) -> dict[int, Budget]:
        """The budgets that devices brought, by client id."""
        found = {client_id: self._profiles[client_id].budget for client_id in self.client_ids}
        return {client_id: budget for client_id, budget in found.items() if budget is not None}

    def join(self, grid: Grid, timeout: float) -> None:
        """Ask nodes as they appear, until as many have answered as there are to be clients.

        A node that answers wrongly, or with an error, is named and left out; the run goes on without it.

        Parameters
        ----------
        timeout : float
            Seconds to wait for nodes.

        Raises
        ------
        FedLPError
            If nodes are missing after that time, or nobody can take part.
        """
        deadline = time.monotonic() + timeout
        asked: set[int] = set()
        while True:
            new = [node for node in grid.get_node_ids() if node not in asked]
            asked.update(new)
            queries = [Message(RecordDict(), node, messages.CAPABILITIES) for node in new]
            left = max(1.0, deadline - time.monotonic())
            for query, reply in zip(queries, exchange(grid, queries, left), strict=True):
                self._register(query.metadata.dst_node_id, reply)
            if len(self._profiles) == self._num_clients or len(asked) >= self._num_clients:
                break
            if time.monotonic() > deadline:
                raise FedLPError(
                    f"{len(asked)} of num_clients={self._num_clients} clients joined within {timeout:g} s; start the "
                    f"others, or lower num_clients"
                )
            time.sleep(_POLL_S)
        if not self._profiles:
            raise FedLPError(f"none of the {len(asked)} clients can take part; the lines above say why")

    def _register(self, node: int, reply: Message) -> None:
        try:
            if reply.has_error():
                raise ProtocolError(reason_of(reply))
            profile = messages.decode_profile(reply.content)
            if profile.client_id in self._profiles:
                raise ProtocolError(f"it says it is client {profile.client_id}, which another node is already")
            if profile.client_id >= self._num_clients:
                raise ProtocolError(f"it says it is client {profile.client_id}; num_clients={self._num_clients}")
        except ProtocolError as error:
            log.warning("node %d cannot take part: %s", node, error)
            return
        self._profiles[profile.client_id] = profile
        self._nodes[profile.client_id] = node
