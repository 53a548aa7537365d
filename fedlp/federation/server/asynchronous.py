r"""Asynchronous rounds: buffered aggregation, on a virtual clock.

FedBuff (Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022):
``clients_per_round`` clients train at once, each on the model that it downloaded; when one ends, another begins. The
server steps when its buffer holds K updates. An update :math:`\Delta_i` whose client downloaded the model
:math:`\tau_i` steps ago counts :math:`(1 + \tau_i)^{-a}` times in the mean, with :math:`a = 1/2` in the paper:

.. math:: w \leftarrow w + \frac{\sum_i n_i (1 + \tau_i)^{-a} \Delta_i}{\sum_i n_i}

entry by entry over the clients that returned the entry, by the run's aggregator and server optimizer. A *round* is
what leads to one step. Events are ordered by (time, client): with equal devices, equal numbers of examples and
K = ``clients_per_round`` each step is a round of FedAvg, bit for bit.

Deviations
----------
The mean is weighted by ``aggregator.weighting`` (the paper: equal). A client takes part once in a step: after its end
it is asked again once the server has stepped. Of several ends at one time all count before anyone is asked.

A checkpoint holds the clients in flight, and the models and memories that they were sent; a resumed run trains them
again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedlp.federation.sampling import Without, sample_cohort
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.exchange import exchange
from fedlp.federation.server.flights import pack_flights, unpack_flights
from fedlp.federation.server.round_record import RoundUnderWay
from fedlp.federation.server.stale_updates import Arrived, StaleUpdates
from fedlp.federation.server.strategy import FedLPStrategy
from fedlp.federation.server.timed_rounds import Asked, Course, TimedStrategy
from fedlp.federation.server.update_collector import UpdateCollector
from fedlp.federation.server.virtual_clock import Part, Phases, VirtualClock
from fedlp.types import Assignment, ClientUpdate


@dataclass
class Flight:
    """A client in flight.

    Attributes
    ----------
    frozen : bytes
        Digest of the frozen tensors of its sub-model; empty without.
    course : Course or None
        Outcome; None until it is computed, which is not before an event may depend on it.
    earliest_s : float
        Second before which it does not end.
    """

    asked: Asked
    frozen: bytes
    course: Course | None
    earliest_s: float

    @property
    def due(self) -> tuple[float, int]:
        """Place among the events: end, or its lower bound, and client."""
        ends = self.earliest_s if self.course is None else self.course.part.ends_s
        return ends, self.asked.instruction.client_id


class AsynchronousStrategy(TimedStrategy):
    """Flower strategy of all methods with buffered asynchronous aggregation.

    Parameters
    ----------
    buffer_size : int
        Updates per step of the server, >= 1.
    staleness_exponent : float
        a >= 0 of an update's factor (1 + staleness) ** -a.
    *args, **kwargs
        Parameters of ``TimedStrategy``.
    """

    def __init__(
        self, *args: Any, clock: VirtualClock, buffer_size: int, staleness_exponent: float, **kwargs: Any
    ) -> None:
        super().__init__(*args, clock=clock, **kwargs)
        self._buffer_size = buffer_size
        self._stale = StaleUpdates(self.submodels, staleness_exponent, self._server.sends_weights)
        self._flights: dict[int, Flight] = {}
        self._versions: dict[int, ServerState] = {}  # by the round in which clients in flight were asked
        self._ended: list[Part] = []  # in this round
        self._begun: list[int] = []
        self._draws = 0

    # ---- a round
    def _train_round(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Process events until the buffer is full; step."""
        assert self.state is not None
        if not self._flights and "started" in self.state.clock:
            self._restore()
        begun, self._ended, self._begun, self._draws = self.now, [], [], 0
        self._open_record(server_round, (), self._present(server_round))
        now = begun + self._calibration_s(self._round.costs)
        collector = self._collector(server_round)
        arrived: Arrived = {}
        while len(arrived) < self._buffer_size:
            flight = self._next(grid, timeout)
            if flight is None or flight.due[0] > now:  # all ends until now have counted
                self._ask(server_round, now, arrays)
                flight = self._next(grid, timeout)
            ends = math.inf if flight is None else max(now, flight.due[0])
            if (arrival := self._next_arrival(now)) < ends:
                now = arrival
            elif flight is None:
                break
            else:
                now = ends
                self._land(server_round, flight, arrived, collector)
        return self._step(server_round, begun, now, arrived, collector)

    def _next(self, grid: Grid, timeout: float) -> Flight | None:
        """Return the flight that ends first; None if there is none."""
        while self._flights:
            first = min(self._flights.values(), key=lambda flight: flight.due)
            if first.course is not None:
                return first
            self._train([flight for flight in self._flights.values() if flight.course is None], grid, timeout)
        return None

    def _train(self, flights: Iterable[Flight], grid: Grid, timeout: float) -> None:
        """Train clients in flight; which are trained together changes no result."""
        waiting = sorted(flights, key=lambda flight: (flight.asked.instruction.server_round, flight.due[1]))
        requests = [flight.asked.message for flight in waiting if flight.asked.message is not None]
        for flight, reply in zip(waiting, exchange(grid, requests, timeout), strict=True):
            flight.course = self._answered(flight.asked, reply)

    def _next_arrival(self, now: float) -> float:
        """Return the second at which more clients may be asked; infinity if as many train as may."""
        if len(self._flights) >= self.settings.clients_per_round:
            return math.inf
        return self.settings.availability.next_arrival(now)

    # ---- down
    def _ask(self, server_round: int, now: float, arrays: ArrayRecord) -> None:
        """Send the current model to as many clients as may train at once."""
        assert self.state is not None
        busy = {*self._flights, *(part.client_id for part in self._ended)}
        busy |= {failure.client_id for failure in self._round.failures}
        candidates = Without(self._candidates(self._present_at(now, server_round)), busy)
        free = self.settings.clients_per_round - len(self._flights)
        if free <= 0 or not candidates:
            return
        cohort = sample_cohort(self.settings.seed, server_round, candidates, free, draw=self._draws, is_sorted=True)
        self._draws += 1
        self._versions[server_round] = self.state
        self._send(server_round, dict.fromkeys(cohort, now), arrays)
        self._begun += [client_id for client_id in cohort if client_id in self._flights]

    def _send(self, server_round: int, started: Mapping[int, float], arrays: ArrayRecord) -> None:
        """Put clients in flight on the model of the state, each from its second on."""
        packer = self._packer()
        for one, is_lost in self._instruct(server_round, sorted(started), arrays):
            client_id, parcel = one.instruction.client_id, packer.single(one)
            message = None if is_lost else parcel.message
            asked = Asked(one.instruction, parcel.bytes_down, message, started[client_id])
            digest = self._round.frozen.pop(client_id, b"")
            self._flights[client_id] = Flight(asked, digest, self._course(asked), self._lower_bound(asked))

    # ---- up
    def _land(self, server_round: int, flight: Flight, arrived: Arrived, collector: UpdateCollector) -> None:
        """End a client's part: its update enters the buffer, or its failure is counted."""
        asked, course = flight.asked, flight.course
        assert course is not None
        instruction = asked.instruction
        client_id = instruction.client_id
        del self._flights[client_id]
        self._ended.append(replace(course.part, staleness=server_round - instruction.server_round))
        if flight.frozen:
            self._round.frozen[client_id] = flight.frozen
        if course.reply is None:
            FedLPStrategy._drop(self, instruction, asked.bytes_down)  # its part is counted already
            return
        is_stale = instruction.server_round < server_round
        sent = self._sent if is_stale and not self._server.sends_weights else None
        if (update := collector.receive(instruction, asked.bytes_down, course.reply, sent)) is not None:
            arrived[client_id] = instruction, update

    def _step(
        self, server_round: int, begun: float, now: float, arrived: Arrived, collector: UpdateCollector
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Make a step of the server with the buffer's updates, in the order of client ids."""
        for _, (instruction, update) in sorted(arrived.items()):
            collector.add(instruction, update, self._discounted(server_round, instruction, update))
        refused = [failure.client_id for failure in self._round.failures]
        self._round.cohort = tuple(sorted({*refused, *(part.client_id for part in self._ended)}))
        found = self._conclude(server_round, collector.tally, len(arrived))
        flying = [_part(flight) for flight in self._flights.values()]
        self._round.simulated = self._clock.round_time(begun, now, self._begun, self._ended, flying)
        self._keep(now)
        return found

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

    # ---- state
    def _keep(self, now: float) -> None:
        """Note time and clients in flight in the state; forget models that none of them was sent."""
        assert self.state is not None
        asked = [flight.asked for flight in self._flights.values()]
        rounds = {one.instruction.server_round for one in asked}
        self._versions = {number: self._versions[number] for number in sorted(rounds)}
        started = {one.instruction.client_id: (one.instruction.server_round, one.started_s) for one in asked}
        self._set_clock(pack_flights(now, started, self._versions, self.state))

    def _restore(self) -> None:
        """Put the clients of a checkpoint in flight again, on the models that they were sent."""
        assert self.state is not None
        current = self.state
        started, self._versions = unpack_flights(current)
        self._round = RoundUnderWay(current.server_round, ())  # these clients are on no record yet
        for number, version in self._versions.items():
            self.state = version
            asked = {client_id: since for client_id, (sent, since) in started.items() if sent == number}
            self._send(number, asked, self._encode_model(version))
        self.state = current


def _part(flight: Flight) -> Part:
    """Return the part of a client that is still in flight, at least up to now."""
    if flight.course is not None:
        return flight.course.part
    client_id, started = flight.asked.instruction.client_id, flight.asked.started_s
    return Part(client_id, started, Phases(flight.earliest_s - started), False)  # the step is not later
