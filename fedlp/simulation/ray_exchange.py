"""Exchange of messages with the actors of a Ray cluster: replies in order or as they come, and the end of actors."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

from flwr.app import Error, Message

from fedlp.errors import FedLPError
from fedlp.federation import flower_compat
from fedlp.federation.server.exchange import no_reply
from fedlp.federation.wire.messages import EVALUATE
from fedlp.simulation.ray_cluster import RayNode
from fedlp.simulation.ray_frames import decode_reply
from fedlp.simulation.ray_pool import RayPool, RayTask, RayWorker, names_of, reason_of
from fedlp.simulation.streamed_grid import CRASHED
from fedlp.simulation.transport import decode_frame
from fedlp.simulation.worker import RAISED

log = logging.getLogger("fedlp")

Numbered = tuple[int, Message, float]
"""A message with its number, and the seconds of work on it."""

_ANYWHERE = ""


class RayExchange:
    """All messages of a run.

    A message whose actor dies is tried once more, on another actor; a client whose state died with its node loses the
    round.

    Parameters
    ----------
    number : callable
        Returns a number of a message's own.
    submit : callable
        Sends a message to a worker; returns the reference to its reply.
    depth : int
        Messages that an actor may have waiting, >= 1.
    """

    def __init__(
        self,
        pool: RayPool,
        number: Callable[[Message], int],
        submit: Callable[[RayWorker, Message], object],
        depth: int,
    ) -> None:
        self._pool, self._number, self._submit, self._depth = pool, number, submit, depth
        self._queues: dict[str, deque[Numbered]] = {_ANYWHERE: deque()}
        self._tried: set[int] = set()
        self._done: dict[int, Message] = {}

    def stream(self, messages: Iterator[Message], timeout: float) -> Iterator[Message]:
        """Yield one reply per message, in order; messages are pulled only as fast as actors answer.

        Parameters
        ----------
        timeout : float
            Seconds of work on one message.
        """
        order: deque[int] = deque()
        is_drawn = False
        try:
            while True:
                is_drawn = is_drawn or self._draw(messages, order, timeout)
                self._dispatch()
                if order and order[0] in self._done:
                    yield self._done.pop(order.popleft())
                elif is_drawn and not order:
                    return
                elif not self._collect():
                    raise FedLPError("no worker on the Ray cluster is left")
        finally:
            self._abandon(order)

    def push(self, messages: Iterable[Message]) -> list[int]:
        """Queue messages for actors, each with its time to live; return their numbers."""
        numbers = []
        for message in messages:
            numbers.append(self._number(message))
            self._queue_of(message).append((numbers[-1], message, message.metadata.ttl))
        self._dispatch()
        return numbers

    def pull(self, numbers: Iterable[int], patience: float) -> list[Message]:
        """Return the replies that have come to some messages, each once; wait some seconds for one."""
        self._dispatch()
        self._collect(patience)
        self._dispatch()
        return [self._done.pop(number) for number in numbers if number in self._done]

    def _abandon(self, numbers: Collection[int]) -> None:
        """Forget messages whose replies nobody waits for."""
        if not numbers:
            return
        for worker in self._pool.workers:
            worker.tasks = deque(task for task in worker.tasks if task.number not in numbers)
        for key, queue in self._queues.items():
            self._queues[key] = deque(waiting for waiting in queue if waiting[0] not in numbers)
        self._done = {number: reply for number, reply in self._done.items() if number not in numbers}

    # ---- down
    def _draw(self, messages: Iterator[Message], order: deque[int], timeout: float) -> bool:
        """Pull messages, up to a window beyond those that are answered; return whether there are no more."""
        window = 2 * self._depth * max(1, len(self._pool.workers))
        while len(order) < window:
            if (message := next(messages, None)) is None:
                return True
            order.append(self._number(message))
            self._queue_of(message).append((order[-1], message, timeout))
        return False

    def _queue_of(self, message: Message) -> deque[Numbered]:
        home = self._pool.home(message.metadata.dst_node_id - 1) if self._is_pinned(message) else None
        return self._queues.setdefault(_ANYWHERE if home is None else home.node_id, deque())

    def _is_pinned(self, message: Message) -> bool:
        """Return whether a message must be answered where its client's state is."""
        return self._pool.pins and message.metadata.message_type != EVALUATE

    def _dispatch(self) -> None:
        """Send waiting messages to the workers with the fewest tasks."""
        while True:
            free = [w for w in self._pool.workers if w.hello is None and len(w.tasks) < self._depth]
            found = next((pair for w in sorted(free, key=lambda w: len(w.tasks)) if (pair := self._next_for(w))), None)
            if found is None:
                return
            worker, (number, message, timeout) = found
            worker.give(RayTask(number, message, timeout, self._submit(worker, message)))

    def _next_for(self, worker: RayWorker) -> tuple[RayWorker, Numbered] | None:
        for key in (worker.node.node_id, _ANYWHERE):
            if queue := self._queues.get(key):
                return worker, queue.popleft()
        return None

    # ---- up
    def _collect(self, most_s: float = float("inf")) -> bool:
        """Wait for any worker and process what it says, its death, or its deadline; return whether one was awaited."""
        awaited = {worker.awaited: worker for worker in self._pool.workers if worker.awaited is not None}
        if not awaited:
            return False
        ray, patience = self._pool.ray, min(most_s, self._patience())
        limit = None if patience == float("inf") else patience
        ready, _ = ray.wait(list(awaited), num_returns=1, timeout=limit)
        if ready:
            ready, _ = ray.wait(list(awaited), num_returns=len(awaited), timeout=0)
        for reference in ready:
            worker = awaited[reference]
            if worker in self._pool.workers:  # no other one's end has ended it
                self._welcome(worker) if worker.hello is not None else self._receive(worker)
        if not ready:
            self._end_late()
        return True

    def _patience(self) -> float:
        """Return the seconds to the next deadline; infinity if there is none."""
        deadlines = [worker.since + worker.tasks[0].timeout for worker in self._pool.workers if worker.tasks]
        return max(0.0, min(deadlines, default=float("inf")) - time.monotonic())

    def _welcome(self, worker: RayWorker) -> None:
        """Take in a worker that was started in a dead one's place."""
        try:
            self._pool.greet(worker)
        except FedLPError as error:
            log.warning("%s", error)
            self._lose_node(worker.node)

    def _receive(self, worker: RayWorker) -> None:
        ray, task = self._pool.ray, worker.tasks[0]
        try:
            reply = ray.get(task.reply)
        except ray.exceptions.RayTaskError as error:
            worker.take()
            self._fail(task, RAISED, reason_of(error))
        except ray.exceptions.RayError as error:
            self._lose(worker, reason_of(error))
        else:
            worker.take()
            self._read(task, reply)

    def _read(self, task: RayTask, reply: bytes) -> None:
        frame, buffers, said = decode_reply(reply)
        for line in said:
            log.warning("%s", line)
        ((about, content),) = decode_frame(frame, buffers, flower_compat.make_array)
        if content is None:
            self._fail(task, *about["error"])
        else:
            self._done[task.number] = flower_compat.make_reply(content, task.message)

    def _fail(self, task: RayTask, code: int, reason: str) -> None:
        self._done[task.number] = Message(Error(code, reason), reply_to=task.message)

    # ---- ends
    def _end_late(self) -> None:
        """Replace workers that are past their deadline."""
        now = time.monotonic()
        for worker in list(self._pool.workers):
            if worker.tasks and now - worker.since >= worker.tasks[0].timeout:
                task = worker.take()
                self._done[task.number] = no_reply(task.message, task.timeout)
                self._return(worker.tasks)
                self._pool.drop(worker)
                self._pool.start(worker.node)

    def _lose(self, worker: RayWorker, reason: str) -> None:
        """Do without a worker that died."""
        if not self._pool.is_alive(worker.node):
            self._lose_node(worker.node)
            return
        self._pool.drop(worker)
        self._retry(worker, reason)
        self._pool.start(worker.node)

    def _lose_node(self, node: RayNode) -> None:
        """Do without a node that died: its clients are tried again on others, or lose the round with their states."""
        lost = self._pool.give_up(node)
        if not self._pool.workers:
            raise FedLPError(f"{node.name} of the Ray cluster died, and no other is left")
        log.warning("%s of the Ray cluster died, and its workers with it", node.name)
        reason = f"{node.name} of the Ray cluster died with the client's state"
        failed = [RayTask(*waiting, None) for waiting in self._queues.pop(node.node_id, ())]
        for worker in lost:
            own = [task for task in worker.tasks if self._is_pinned(task.message)]
            failed += own
            worker.tasks = deque(task for task in worker.tasks if task not in own)
            self._retry(worker, f"{node.name} died")
        for task in failed:
            self._fail(task, CRASHED, reason)

    def _retry(self, worker: RayWorker, reason: str) -> None:
        """Queue the tasks of a dead worker again; the one that it worked on fails if it has failed before."""
        if worker.tasks and worker.tasks[0].number in self._tried:
            self._fail(worker.tasks.popleft(), CRASHED, f"the client's process died twice ({reason})")
        if worker.tasks:
            self._tried.add(worker.tasks[0].number)
            names = names_of(task.message for task in worker.tasks)
            log.warning("a worker on %s died (%s); tried again: %s", worker.node.name, reason, names)
        self._return(worker.tasks)

    def _return(self, tasks: deque[RayTask]) -> None:
        """Put tasks back in front of their queues."""
        for task in reversed(tasks):
            self._queue_of(task.message).appendleft((task.number, task.message, task.timeout))
