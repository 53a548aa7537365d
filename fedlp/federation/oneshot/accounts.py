"""Costs and failures of the clients whose data are pooled, by line of ``rounds.jsonl``."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fedlp.errors import FedLPError
from fedlp.federation.server.round_record import RoundUnderWay
from fedlp.types import ClientCost, ClientFailure, RoundRecord

log = logging.getLogger("fedlp")

_COUNTS = ("num_examples", "bytes_down", "bytes_up", "params_down", "params_up")


class PoolAccounts:
    """Accounts of a pool of clients.

    Parameters
    ----------
    macs : float
        Multiply-accumulates of one forward pass of an example.
    """

    def __init__(self, macs: float) -> None:
        self._macs = macs
        self.begin(1)

    def begin(self, server_round: int) -> None:
        """Start the counts of a new line of ``rounds.jsonl``."""
        self.record = RoundUnderWay(server_round, ())
        self._spent: dict[int, dict[str, int]] = {}
        self._passes: dict[int, int] = {}

    def finish(self, coverage: Mapping[str, float], metrics: dict[str, float], wall_time_s: float) -> RoundRecord:
        """Return the record since :meth:`begin`; its cohort holds all clients that were asked."""
        self.record.cohort = tuple(sorted(self._spent))
        self.record.costs = [
            ClientCost(client_id=client_id, macs=self._macs * self._passes[client_id], **spent)
            for client_id, spent in sorted(self._spent.items())
        ]
        self.record.coverage, self.record.metrics = coverage, metrics
        return self.record.finish(wall_time_s)

    def spend(self, client_id: int, passes: int = 1, **spent: int) -> None:
        """Add to the counts of a client: examples, each passed forward some times, bytes and parameters each way."""
        self._passes[client_id] = self._passes.get(client_id, 0) + passes * spent.get("num_examples", 0)
        account = self._spent.setdefault(client_id, dict.fromkeys(_COUNTS, 0))
        for key, value in spent.items():
            account[key] += value

    def fail(self, client_id: int, reason: str, error: FedLPError) -> None:
        """Count and name a failed client."""
        self.record.failures.append(ClientFailure(client_id, reason, str(error)))
        log.warning("round %d: client %d failed (%s): %s", self.record.server_round, client_id, reason, error)
