"""The local engine: a Flower Grid in this process, clients in worker processes of one thread each.

Forked workers inherit model, data and partition from the parent: a run starts at once and data is held once. Spawned
ones are handed them in shared memory (:mod:`fedlp.simulation.spawning`); without workers, clients answer in this
process. Messages keep Flower's form and go to the same ClientApp as on any other engine. Replies come back in the order
of sending; only a few are held at a time, so that memory does not grow with the cohort. Messages that are pushed wait
for idle workers, which answer while the server does other things.
"""

from __future__ import annotations

import gc
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType

from flwr.app import Error, Message
from flwr.clientapp import ClientApp

from fedlp.federation import flower_compat
from fedlp.federation.server.exchange import no_reply
from fedlp.federation.server.roster import Profiles
from fedlp.federation.wire.messages import CAPABILITIES, TRAIN
from fedlp.federation.wire.stacks import TRAIN_COHORT, count_clients
from fedlp.simulation.starting import make_starter, refuse_unguarded, start_method
from fedlp.simulation.streamed_grid import CRASHED, PULL_S, StreamedGrid
from fedlp.simulation.transport import copy_array, decode_frame, encode_frame
from fedlp.simulation.worker import STOP, keep_freed_memory
from fedlp.simulation.worker_process import Duty, Numbered, Task, Worker

_SMALL_BYTES, _LARGE_BYTES = 1 << 20, 1 << 24
_LENT_BYTES, _MOST_LENT = 1 << 27, 64  # replies of a worker that are read where they lie: bytes, and number
_TOGETHER = (TRAIN, CAPABILITIES)  # messages that may travel together


Waiting = tuple[Numbered, float]
"""Messages that wait for a worker, and the seconds that each client may take."""


class LocalGrid(StreamedGrid):
    """Flower's Grid over worker processes of this machine; a context manager, with which they end.

    Parameters
    ----------
    load_app : callable
        Returns the ClientApp; called once in every worker. Spawned workers import it by name, or are given what makes
        an equal one (:func:`fedlp.simulation.parcel.hand_over_of`).
    num_clients : int
        Nodes; node ``i + 1`` is the client of partition ``i``.
    num_workers : int
        Processes, one thread each; with 0 clients answer in this process, one after another.
    message_bytes : int
        Upper bound of the arrays of one message.
    run_config : dict
        Content of ``Context.run_config``.
    cohort : int
        Messages of one kind that a worker receives at once, >= 1; also the most clients of one message.
    stacks : bool
        Whether the app answers messages for several clients.
    start : str
        How workers start: "fork", "spawn", or "auto" for what fits the system.
    profiles : callable, optional
        Returns the profiles of all clients; without it, nodes are asked.

    Raises
    ------
    FedLPError
        If workers cannot be started so.
    """

    def __init__(
        self,
        load_app: Callable[[], ClientApp],
        num_clients: int,
        num_workers: int,
        message_bytes: int,
        run_config: dict[str, bool | float | int | str] | None = None,
        cohort: int = 1,
        stacks: bool = False,
        start: str = "auto",
        profiles: Callable[[], Profiles] | None = None,
    ) -> None:
        refuse_unguarded()
        keep_freed_memory()  # of one update for the next
        super().__init__(num_clients, profiles)
        self.cohort, self.stacks = cohort, stacks and cohort > 1
        capacity = (message_bytes + (1 << 16)) * cohort
        self._depth = _depth(message_bytes, num_workers, cohort)
        at_work = max(1, num_workers) * self._depth
        ahead = 1 if message_bytes > _LARGE_BYTES else at_work  # replies that may wait for an earlier one
        self._window = at_work + ahead
        self._again: deque[Waiting] = deque()  # what a worker that ended had been given
        self._pushed: deque[Waiting] = deque()
        self._done: dict[int, Message] = {}  # by the number of the message
        method = start_method(start)
        spare = min(_LENT_BYTES // capacity, _MOST_LENT) if self.stacks and method != "spawn" else 0
        duty = Duty(self._depth + spare, capacity, load_app, run_config or {}, num_clients)
        self._starter = make_starter(method, num_workers, duty)
        self._selector = self._starter.selector()
        gc.freeze()  # memory stays shared with the workers until a garbage collection writes into it, here or there
        self._workers: list[Worker] = []
        try:
            for i in range(max(1, num_workers)):
                self._workers.append(self._start_worker(i))
            for worker in self._workers:
                self._starter.await_ready(worker)
        except BaseException:
            self._end(is_lost=True)
            raise

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self, is_lost: bool = False) -> None:
        """End the workers: kindly, but for those in the middle of something nobody waits for any more."""
        for worker in self._workers:
            if worker.tasks or is_lost:
                worker.process.kill()
            self._deliver(worker, STOP)
        for worker in self._workers:
            worker.end()
        self._selector.close()
        self._starter.close()
        gc.unfreeze()

    # ---- the exchange
    def stream(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Yield one reply per message, in order, while workers answer later ones.

        Parameters
        ----------
        timeout : float
            Deadline of a worker for one message; it is then replaced and the reply is an error.
        """
        source = self._together(messages)
        order: deque[deque[int]] = deque()  # of what travelled together, and whose replies are not yet yielded
        exhausted = False
        while True:
            while (worker := self._idlest()) is not None:
                if self._again:
                    self._send(worker, *self._again.popleft())
                    continue
                if exhausted or len(order) >= self._window:
                    break
                if (found := next(source, None)) is None:
                    exhausted = True
                    break
                self._send(worker, found, timeout)
                order.append(deque(number for number, _ in found))
            if order and order[0][0] in self._done:
                reply = self._done.pop(order[0].popleft())
                if not order[0]:
                    order.popleft()
                yield reply
            elif exhausted and not order:
                return
            else:
                self._collect()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages for idle workers; each may take its time to live."""
        sent = [(self._number(message), message) for message in messages]
        self._pushed.extend(([numbered], numbered[1].metadata.ttl) for numbered in sent)
        self._feed()
        return [str(number) for number, _ in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come to these messages, each once; wait a moment for one."""
        self._feed()
        self._collect(PULL_S)
        self._feed()
        numbers = map(int, message_ids)
        return [self._done.pop(number) for number in numbers if number in self._done]

    def _feed(self) -> None:
        """Give pushed messages to workers that have nothing to do."""
        for queue in (self._again, self._pushed):
            while queue and (worker := self._idlest()) is not None and not worker.tasks:
                self._send(worker, *queue.popleft())

    def _together(self, messages: Iterable[Message]) -> Iterator[Numbered]:
        """Yield messages that travel together: neighbours of one kind, made only when they are needed."""
        found: Numbered = []
        for message in messages:
            kind = message.metadata.message_type
            if found and (kind != found[0][1].metadata.message_type or kind not in _TOGETHER):
                yield found
                found = []
            found.append((self._number(message), message))
            if len(found) == self.cohort:
                yield found
                found = []
        if found:
            yield found

    def _idlest(self) -> Worker | None:
        worker = min(self._workers, key=lambda worker: len(worker.tasks))
        return worker if len(worker.tasks) < self._depth else None

    def _send(self, worker: Worker, numbered: Numbered, timeout: float) -> None:
        slot = worker.free_slot()
        assert slot is not None
        items = [self._item(message) for _, message in numbered]
        frame = bytes((slot,)) + encode_frame(items, worker.slots[slot][0])
        clients = sum(count_clients(message.content) for _, message in numbered)
        worker.tasks.append(Task(numbered, slot, time.monotonic(), clients, timeout))
        self._deliver(worker, frame)

    def _deliver(self, worker: Worker, frame: bytes) -> None:
        try:
            worker.connection.send_bytes(frame)
        except OSError:
            return  # the worker is gone: its closed pipe is found, and its tasks are settled, in _collect

    def _collect(self, patience: float = float("inf")) -> None:
        """Wait for any worker and process its event: replies, a death, or a deadline.

        Parameters
        ----------
        patience : float
            Seconds of the wait at most.
        """
        busy = [worker.tasks[0] for worker in self._workers if worker.tasks]
        if not busy:
            return
        deadline = min(task.since + task.timeout * task.clients for task in busy)
        patience = min(patience, max(0.0, deadline - time.monotonic()))
        ready = self._selector.select(None if patience == float("inf") else patience)
        for key, _ in ready:
            self._receive(key.data)
        if ready:
            return
        now = time.monotonic()
        for i, worker in enumerate(self._workers):
            if worker.tasks and now - worker.tasks[0].since >= worker.tasks[0].timeout * worker.tasks[0].clients:
                self._settle(worker.tasks[0], partial(no_reply, timeout=worker.tasks[0].timeout))
                self._replace(i)

    def _receive(self, i: int) -> None:
        worker = self._workers[i]
        try:
            frame = worker.connection.recv_bytes()
        except (EOFError, OSError):
            worker.process.join(timeout=5)
            reason = f"the client's process died (exit code {worker.process.exitcode})"
            for task in list(worker.tasks)[:1]:  # a worker may also die while it waits
                self._settle(task, lambda message: Message(Error(CRASHED, reason), reply_to=message))
            self._replace(i)
            return
        task = worker.tasks.popleft()
        is_stack = task.messages[0][1].metadata.message_type == TRAIN_COHORT
        wrap = worker.lend(frame[0], self._depth) if is_stack else None
        items = decode_frame(frame[1:], worker.slots[frame[0]][1], wrap or copy_array)
        if worker.tasks:
            worker.tasks[0].since = time.monotonic()
        for (number, message), (about, content) in zip(task.messages, items, strict=True):
            if content is not None:
                self._done[number] = flower_compat.make_reply(content, message)
            else:
                code, reason = about["error"]
                self._done[number] = Message(Error(code, reason), reply_to=message)

    def _settle(self, task: Task, fail: Callable[[Message], Message]) -> None:
        """File the failure of a message on which a worker ended; several are tried again, each by itself."""
        if len(task.messages) > 1:
            self._again.extend(([numbered], task.timeout) for numbered in task.messages)
        else:
            self._done |= {number: fail(message) for number, message in task.messages}

    # ---- workers
    def _start_worker(self, i: int) -> Worker:
        worker = self._starter.start()
        self._selector.register(worker.connection, selectors.EVENT_READ, i)
        return worker

    def _replace(self, i: int) -> None:
        """Kill a worker and give all but its first task to a new one."""
        old = self._workers[i]
        old.process.kill()
        self._selector.unregister(old.connection)
        old.end()
        self._workers[i] = new = self._start_worker(i)
        self._starter.await_ready(new)
        for task in list(old.tasks)[1:]:
            self._send(new, task.messages, task.timeout)


def _depth(message_bytes: int, num_workers: int, cohort: int) -> int:
    """Return the tasks that a worker may have waiting: one where memory for messages counts and another works on."""
    if not num_workers or (message_bytes > _LARGE_BYTES and num_workers > 1):
        return 1
    return 8 if message_bytes <= _SMALL_BYTES and cohort == 1 else 2
