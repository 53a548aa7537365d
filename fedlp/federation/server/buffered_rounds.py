r"""Asynchronous rounds on the wall clock: buffered aggregation over real devices.

FedBuff as in :mod:`fedlp.federation.server.asynchronous`, with the arrival of replies in place of simulated ends:
``clients_per_round`` clients train at once; a reply enters the buffer when it comes, and an idle client is sent the
newest model in its place; the server steps when the buffer holds K updates. Of any Flower grid only messages that are
pushed and pulled are asked, so that the local engine's workers and SuperNodes behind a SuperLink are served alike.

What is sent depends on the order of arrival: equal seeds do not give equal models. One case is an exception, in which
nobody is idle before the step: K = ``clients_per_round`` = ``num_clients`` and no failures. Its steps are rounds of
FedAvg, bit for bit, since the updates of a step are summed in the order of client ids.

A client takes part once in a step: on the same model it would return the same update. A round ends before its buffer
is full where no client is in flight and none is left to ask. A checkpoint holds the state between two steps; clients in
flight are not part of it, and a resumed run asks anew.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, Error, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor

from fedlp.federation.sampling import Without, sample_cohort
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.exchange import GONE
from fedlp.federation.server.open_exchange import OpenExchange
from fedlp.federation.server.stale_updates import Arrived, StaleUpdates
from fedlp.federation.server.strategy import FedLPStrategy
from fedlp.federation.server.update_collector import UpdateCollector, most_examples
from fedlp.types import Assignment, ClientUpdate

log = logging.getLogger("fedlp")

_LOOK_S = 5.0  # between looks for nodes that join while the buffer fills


@dataclass(frozen=True, slots=True)
class Flight:
    """A client in flight: its instruction, and the model's number of bytes.

    Attributes
    ----------
    frozen : bytes
        Digest of the frozen tensors of its sub-model; empty without.
    """

    instruction: Assignment
    bytes_down: int
    frozen: bytes


class BufferedStrategy(FedLPStrategy):
    """Flower strategy of all methods with buffered asynchronous aggregation in the order of arrival.

    Parameters
    ----------
    buffer_size : int
        Updates per step of the server, >= 1.
    staleness_exponent : float
        a >= 0 of an update's factor (1 + staleness) ** -a.
    *args, **kwargs
        Parameters of ``FedLPStrategy``.
    """

    def __init__(self, *args: Any, buffer_size: int, staleness_exponent: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._buffer_size = buffer_size
        self._stale = StaleUpdates(self.submodels, staleness_exponent, self._server.sends_weights)
        self._post: OpenExchange | None = None
        self._flights: dict[int, Flight] = {}  # by message
        self._inbox: deque[tuple[Message, Message]] = deque()  # answered, but beyond the buffer of the last step
        self._versions: dict[int, ServerState] = {}  # by the round in which clients in flight were asked
        self._ended: dict[int, int] = {}  # staleness of each client that answered in this round
        self._asked: list[int] = []  # in this round
        self._draws, self._looked = 0, 0.0

    # ---- the run
    def summary(self) -> None:
        """Log one line about the strategy."""
        assert self.state is not None
        found = type(self.policy).__name__, self.settings.clients_per_round, self._buffer_size
        log.info("%s, asynchronous: %d clients at once, a step per %d updates as they arrive", *found)
        if done := self.state.server_round:
            log.warning("after round %d: clients in flight are asked anew, and their old answers are not read", done)

    def start(self, *args: Any, **kwargs: Any) -> Result:
        """Run the remaining rounds and return the final model; see ``FedLPStrategy.start``."""
        result = super().start(*args, **kwargs)
        if in_flight := sorted(flight.instruction.client_id for flight in self._flights.values()):
            log.info("the run ends without the answers of clients in flight: %s", ", ".join(map(str, in_flight)))
        return result

    # ---- a round
    def _train_round(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Take replies until the buffer is full; step."""
        if self._post is None:
            self._post = OpenExchange(grid, timeout)
        self._open_record(server_round, (), self._present(server_round))
        self._ended, self._asked, self._draws, self._looked = {}, [], 0, time.monotonic()
        collector = self._collector(server_round)
        arrived: Arrived = {}
        while True:
            while self._inbox and len(arrived) < self._buffer_size:
                self._land(server_round, *self._inbox.popleft(), arrived, collector)
            if len(arrived) == self._buffer_size:
                break
            self._look(server_round, grid, timeout)
            self._ask(server_round, arrays, self._post)
            if not self._flights:
                break
            self._inbox.extend(self._post.take())
        return self._step(server_round, arrived, collector)

    def _look(self, server_round: int, grid: Grid, timeout: float) -> None:
        """Admit clients that have joined while the buffer fills."""
        if time.monotonic() - self._looked >= _LOOK_S:
            self.policy = self._budgets.welcome(self.policy, server_round, grid, timeout)
            self._looked = time.monotonic()

    # ---- down
    def _ask(self, server_round: int, arrays: ArrayRecord, post: OpenExchange) -> None:
        """Send the current model to as many idle clients as may train at once."""
        assert self.state is not None
        free = self.settings.clients_per_round - len(self._flights)
        if free <= 0:
            return
        busy = {*self._ended, *(flight.instruction.client_id for flight in self._flights.values())}
        busy |= {failure.client_id for failure in self._round.failures}
        candidates = Without(self._candidates(self._present(server_round)), busy)
        if not candidates:
            return
        cohort = sample_cohort(self.settings.seed, server_round, candidates, free, draw=self._draws, is_sorted=True)
        self._draws += 1
        self._asked += cohort
        self._versions[server_round] = self.state
        packer, sent = self._packer(), list[Message]()
        for one in self._present_ones(server_round, cohort, arrays, packer):
            parcel = packer.single(one)
            digest = self._round.frozen.pop(one.instruction.client_id, b"")
            self._flights[id(parcel.message)] = Flight(one.instruction, parcel.bytes_down, digest)
            sent.append(parcel.message)
        post.send(sent)

    # ---- up
    def _land(
        self, server_round: int, message: Message, reply: Message, arrived: Arrived, collector: UpdateCollector
    ) -> None:
        """End a client's part: its update enters the buffer, or its failure is counted."""
        flight = self._flights.pop(id(message))
        instruction = flight.instruction
        client_id = instruction.client_id
        self._ended[client_id] = server_round - instruction.server_round
        if flight.frozen:
            self._round.frozen[client_id] = flight.frozen
        if client_id not in self._roster.client_ids:
            reply = Message(Error(GONE, "it was dismissed meanwhile"), reply_to=message)
        sent = self._sent if self._ended[client_id] and not self._server.sends_weights else None
        if (update := collector.receive(instruction, flight.bytes_down, reply, sent)) is not None:
            arrived[client_id] = instruction, update

    def _step(
        self, server_round: int, arrived: Arrived, collector: UpdateCollector
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Make a step of the server with the buffer's updates, in the order of client ids."""
        refused = (failure.client_id for failure in self._round.failures)
        self._round.cohort = tuple(sorted({*refused, *self._ended}))
        self._round.staleness = dict(sorted(self._ended.items()))
        known = {*self._roster.client_ids}
        cohort = [client_id for client_id in self._round.cohort if client_id in known]
        most = most_examples(self._server.aggregator, cohort, self._roster)
        collector = replace(collector, most_examples=most)
        for _, (instruction, update) in sorted(arrived.items()):
            collector.add(instruction, update, self._discounted(server_round, instruction, update))
        found = self._conclude(server_round, collector.tally, len(arrived))
        flying = {flight.instruction.server_round for flight in self._flights.values()}
        self._versions = {number: state for number, state in self._versions.items() if number in flying}
        return found

    def _note_privacy(self, server_round: int, before: ServerState) -> None:
        """Record the ledger's entries: who is asked may upload, whenever the answer comes."""
        if self._ledger is not None:
            self._round.privacy |= self._ledger(server_round, self._asked)

    def _discounted(self, server_round: int, instruction: Assignment, update: ClientUpdate) -> Mapping[str, Tensor]:
        """Return an update as one of the current model."""
        assert self.state is not None
        if not (staleness := server_round - instruction.server_round):
            return update.params
        version = self._versions[instruction.server_round]
        return self._stale.discounted(staleness, instruction, update, self.state, version, self.policy)

    def _sent(self, instruction: Assignment, update: ClientUpdate) -> Mapping[str, Tensor]:
        """Return the values that a client received of the units that it returns."""
        return self._stale.sent(instruction, update, self._versions[instruction.server_round], self.policy)
