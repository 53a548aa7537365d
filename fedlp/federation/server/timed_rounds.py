"""Synchronous rounds on a virtual clock: a round ends with its last answer, a deadline, or the first k of n answers.

Clients train on the engine as ever; the clock adds the second at which each answer arrives. An answer after the
deadline is late, and its update is dropped; so is that of a client that leaves first. A client of which download and
training alone take too long is not trained at all. Without deadline and over-selection the model is the one of the same
run without a clock, bit for bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord
from flwr.serverapp import Grid

from fedlp.federation.server.cohorts import StackingGrid
from fedlp.federation.server.exchange import LATE, LEFT, SURPLUS, OwnError, exchange
from fedlp.federation.server.strategy import FedLPStrategy
from fedlp.federation.server.virtual_clock import Part, Phases, VirtualClock
from fedlp.federation.wire import messages
from fedlp.federation.wire.ranges import LARGEST_COST, read_number
from fedlp.federation.wire.record_access import read_metrics
from fedlp.types import Assignment, ClientCost


@dataclass(frozen=True, slots=True)
class Asked:
    """A client that got an instruction.

    Attributes
    ----------
    message : Message or None
        Instruction in a message; None for a client that drops out.
    started_s : float
        Second at which it was sent, since the start of the run.
    """

    instruction: Assignment
    bytes_down: int
    message: Message | None
    started_s: float


@dataclass(frozen=True, slots=True)
class Course:
    """Outcome of a client's part: the seconds that it took, and the reply that counts."""

    part: Part
    reply: Message | None


class TimedStrategy(FedLPStrategy):
    """Flower strategy of all methods on a virtual clock.

    Parameters
    ----------
    clock : VirtualClock
        Durations of clients' parts.
    *args, **kwargs
        Parameters of ``FedLPStrategy``.
    """

    def __init__(self, *args: Any, clock: VirtualClock, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock = clock
        self._started = 0.0  # of the round's training, in seconds since the start of the run
        self._parts: list[Part] = []

    @property
    def now(self) -> float:
        """Virtual time of the state, in seconds since the start of the run."""
        assert self.state is not None
        return float(self.state.clock["now"]) if "now" in self.state.clock else 0.0

    def _present(self, server_round: int) -> Sequence[int]:
        """Return the clients that are available now and have data, sorted."""
        return self._present_at(self.now, server_round)

    def _present_at(self, now: float, server_round: int) -> Sequence[int]:
        return self.settings.availability.present_at(now, server_round, self._roster.client_ids)

    # ---- a round
    def _train_round(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Run a round; record its time and move the clock to its end."""
        begun, self._parts = self.now, []
        self._set_clock({"now": torch.tensor(self._first_presence(begun, server_round), dtype=torch.float64)})
        self._started = self.now
        arrays, metrics = super()._train_round(server_round, arrays, grid, timeout)
        ends = max([self._started, *(part.ends_s for part in self._parts)])
        parts = sorted(self._parts, key=lambda part: (part.ends_s, part.client_id))
        asked = [part.client_id for part in parts]
        self._round.simulated = self._clock.round_time(begun, ends, asked, parts)
        self._set_clock({"now": torch.tensor(ends, dtype=torch.float64)})
        return arrays, metrics

    def _trains_stacks(self, grid: StackingGrid) -> bool:
        """Return False: each client has seconds of its own."""
        return False

    def _first_presence(self, now: float, server_round: int) -> float:
        """Return the first second from ``now`` on at which a client may be sampled; ``now`` if none ever may."""
        found = now
        while not any(map(self._takes_part, self._present_at(found, server_round))):
            found = self.settings.availability.next_arrival(found)
            if found == math.inf:
                return now
        return found

    def _set_clock(self, clock: Mapping[str, torch.Tensor]) -> None:
        assert self.state is not None
        self.state = replace(self.state, clock=clock)

    def _begin_round(self, server_round: int) -> tuple[int, ...]:
        """Open the record of a round; training begins when clients' calibration, if there was any, is done."""
        cohort = super()._begin_round(server_round)
        self._started += self._calibration_s(self._round.costs)
        return cohort

    def _calibration_s(self, costs: Iterable[ClientCost]) -> float:
        """Return the seconds of the slowest client of a calibration."""
        taken: dict[int, float] = {}
        for cost in costs:
            phases = self._clock.phases(cost.client_id, cost.bytes_down, 0, 0.0, cost.macs, cost.bytes_up)
            taken[cost.client_id] = taken.get(cost.client_id, 0.0) + phases.total
        return max(taken.values(), default=0.0)

    def _drop(self, instruction: Assignment, bytes_down: int) -> None:
        """Count a client that received its sub-model and dropped out."""
        super()._drop(instruction, bytes_down)
        course = self._course(Asked(instruction, bytes_down, None, self._started))
        assert course is not None
        self._parts.append(course.part)

    # ---- the exchange
    def _exchange(
        self, server_round: int, grid: Grid, requests: Iterable[Message], timeout: float
    ) -> Iterator[Message]:
        """Yield one reply per instruction, in order; an error in place of what does not arrive in time."""
        asked = (Asked(*self._round.assigned[-1], message, self._started) for message in requests)
        exchanged = self._exchange_first if self.settings.extra_clients else self._exchange_each
        for course in exchanged(grid, asked, timeout):
            self._parts.append(course.part)
            assert course.reply is not None
            yield course.reply

    def _exchange_each(self, grid: Grid, asked: Iterable[Asked], timeout: float) -> Iterator[Course]:
        """Yield each client's course, in order, as replies come."""
        waiting: deque[tuple[Asked, Course | None]] = deque()  # with the course of those that are not trained

        def sent() -> Iterator[Message]:
            for one in asked:
                waiting.append((one, self._course(one)))
                if waiting[-1][1] is None and one.message is not None:
                    yield one.message

        for reply in exchange(grid, sent(), timeout):
            while (course := waiting[0][1]) is not None:
                waiting.popleft()
                yield course
            yield self._answered(waiting.popleft()[0], reply)
        yield from (course for _, course in waiting if course is not None)

    def _exchange_first(self, grid: Grid, asked: Iterable[Asked], timeout: float) -> Iterator[Course]:
        """Yield each client's course, in order; the first ``clients_per_round`` good answers end the round.

        Clients train in the order in which they could answer at the earliest, and only as many as needed.
        """
        everyone, enough = list(asked), self.settings.clients_per_round
        courses = {i: course for i, one in enumerate(everyone) if (course := self._course(one)) is not None}
        earliest = {i: self._lower_bound(one) for i, one in enumerate(everyone) if i not in courses}
        waiting = sorted(earliest, key=lambda i: (earliest[i], i))
        while waiting:
            good = self._good(courses)
            if len(good) >= enough and good[enough - 1] < (earliest[waiting[0]], waiting[0]):
                break
            count = max(1, enough - len(good))
            batch, waiting = sorted(waiting[:count]), waiting[count:]
            requests = [message for i in batch if (message := everyone[i].message) is not None]
            for i, reply in zip(batch, exchange(grid, requests, timeout), strict=True):
                courses[i] = self._answered(everyone[i], reply)
        good = self._good(courses)
        last = good[enough - 1] if len(good) >= enough else (math.inf, 0)
        for i, one in enumerate(everyone):
            course = courses.get(i)
            is_in_time = course is not None and (course.part.ends_s, i) <= last
            yield course if course is not None and is_in_time else self._surplus(one, course, last[0])

    @staticmethod
    def _good(courses: Mapping[int, Course]) -> list[tuple[float, int]]:
        """Return ends and numbers of the courses that were finished, sorted."""
        return sorted((course.part.ends_s, i) for i, course in courses.items() if course.part.finished)

    def _surplus(self, asked: Asked, course: Course | None, ends: float) -> Course:
        """Return the course of a client that is told to stop since enough others have answered."""
        phases = course.part.phases if course is not None else self._phases(asked, 0.0, 0)
        assert asked.message is not None
        error = OwnError(SURPLUS, f"{self.settings.clients_per_round} others were first")
        part = Part(asked.instruction.client_id, asked.started_s, phases.until(ends - asked.started_s), False)
        return Course(part, Message(error, reply_to=asked.message))

    # ---- one client
    def _course(self, asked: Asked) -> Course | None:
        """Return the course of a client that need not be trained; None for all others."""
        client_id = asked.instruction.client_id
        phases = self._phases(asked, 0.0, 0)
        if asked.message is None:
            return Course(Part(client_id, asked.started_s, Phases(phases.download_s), False), None)
        return self._too_late(asked, phases)

    def _answered(self, asked: Asked, reply: Message) -> Course:
        """Return the course of a client that was trained."""
        if reply.has_error():
            part = Part(asked.instruction.client_id, asked.started_s, self._phases(asked, 0.0, 0), False)
            return Course(part, reply)
        phases = self._phases(asked, _more_macs(reply), messages.count_bytes(reply.content))
        on_time = Course(Part(asked.instruction.client_id, asked.started_s, phases, True), reply)
        return self._too_late(asked, phases) or on_time

    def _too_late(self, asked: Asked, phases: Phases) -> Course | None:
        """Return the course of a client that is late, or leaves before it answers; None if it does neither."""
        client_id, deadline = asked.instruction.client_id, self._clock.deadline_s
        leaves = self.settings.availability.leaves_at(client_id, asked.started_s) - asked.started_s
        limit = min(leaves, math.inf if deadline is None else deadline)
        if phases.total <= limit:
            return None
        error = OwnError(LATE, f"no answer within {limit:g} simulated seconds")
        if leaves == limit:
            error = OwnError(LEFT, f"it left {limit:g} simulated seconds after it was asked")
        return self._failed(asked, phases.until(limit), error)

    @staticmethod
    def _failed(asked: Asked, phases: Phases, error: Error) -> Course:
        assert asked.message is not None
        part = Part(asked.instruction.client_id, asked.started_s, phases, False)
        return Course(part, Message(error, reply_to=asked.message))

    def _lower_bound(self, asked: Asked) -> float:
        """Return the earliest second at which a client could answer, in seconds since the start of the run."""
        return asked.started_s + self._phases(asked, 0.0, 0).total

    def _phases(self, asked: Asked, more_macs: float, bytes_up: int) -> Phases:
        instruction = asked.instruction
        examples = self._roster.profile(instruction.client_id).num_examples
        macs = self._costs.macs(instruction.submodel).training
        return self._clock.phases(instruction.client_id, asked.bytes_down, examples, macs, more_macs, bytes_up)


def _more_macs(reply: Message) -> float:
    """Return the multiply-accumulates that a reply reports beyond training; 0 for an invalid one, which is rejected."""
    try:
        found = read_metrics(reply.content, messages.METRICS).get("pruning-macs", 0.0)
    except (KeyError, ValueError):
        return 0.0
    return read_number(found, 0.0, LARGEST_COST) or 0.0
