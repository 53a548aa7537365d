"""One exchange of messages with the actors of a Ray cluster: replies in order, and what becomes of those that die."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator

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

Numbered = tuple[int, Message]
"""A message with its place in the order."""

_ANYWHERE = ""


class RayExchange:
    """Messages of one exchange.

    A message whose actor dies is tried once more, on another actor; a client whose state died with its node loses the
    round.

    Parameters
    ----------
    messages : iterator of Message
        Pulled only as fast as actors answer.
    submit : callable
        Sends a message to a worker; returns the reference to its reply.
    depth : int
        Messages that an actor may have waiting, >= 1.
    timeout : float
        Seconds of work on one message.
    """

    def __init__(
        self,
        pool: RayPool,
        messages: Iterator[Message],
        submit: Callable[[RayWorker, Message], object],
        depth: int,
        timeout: float,
    ) -> None:
        self._pool, self._submit, self._depth, self._timeout = pool, submit, depth, timeout
        self._messages: Iterator[Message] | None = messages
        self._queues: dict[str, deque[Numbered]] = {_ANYWHERE: deque()}
        self._tried: set[int] = set()
        self._done: dict[int, Message] = {}
        self._drawn = 0

    def replies(self) -> Iterator[Message]:
        """Yield one reply per message, in order."""
        yielded = 0
        try:
            while True:
                self._draw(yielded)
                self._dispatch()
                if yielded in self._done:
                    yielded += 1
                    yield self._done.pop(yielded - 1)
                elif self._messages is None and yielded == self._drawn:
                    return
                else:
                    self._collect()
        finally:
            for worker in self._pool.workers:
                worker.tasks.clear()  # of an exchange that nobody waits for

    # ---- down
    def _draw(self, yielded: int) -> None:
        """Pull messages, up to a window beyond those that are answered."""
        window = 2 * self._depth * max(1, len(self._pool.workers))
        while self._messages is not None and self._drawn - yielded < window:
            if (message := next(self._messages, None)) is None:
                self._messages = None
                return
            self._queue_of(message).append((self._drawn, message))
            self._drawn += 1

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
            worker, (index, message) = found
            worker.give(RayTask(index, message, self._submit(worker, message)))

    def _next_for(self, worker: RayWorker) -> tuple[RayWorker, Numbered] | None:
        for key in (worker.node.node_id, _ANYWHERE):
            if queue := self._queues.get(key):
                return worker, queue.popleft()
        return None

    # ---- up
    def _collect(self) -> None:
        """Wait for any worker and process what it says, its death, or its deadline."""
        awaited = {worker.awaited: worker for worker in self._pool.workers if worker.awaited is not None}
        if not awaited:
            raise FedLPError("no worker on the Ray cluster is left")
        ray = self._pool.ray
        ready, _ = ray.wait(list(awaited), num_returns=1, timeout=self._patience())
        if ready:
            ready, _ = ray.wait(list(awaited), num_returns=len(awaited), timeout=0)
        for reference in ready:
            worker = awaited[reference]
            if worker in self._pool.workers:  # no other one's end has ended it
                self._welcome(worker) if worker.hello is not None else self._receive(worker)
        if not ready:
            self._end_late()

    def _patience(self) -> float | None:
        """Return the seconds to the next deadline; None if there is none."""
        starts = [worker.since for worker in self._pool.workers if worker.tasks]
        if not starts or self._timeout == float("inf"):
            return None
        return max(0.0, min(starts) + self._timeout - time.monotonic())

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
            self._done[task.index] = flower_compat.make_reply(content, task.message)

    def _fail(self, task: RayTask, code: int, reason: str) -> None:
        self._done[task.index] = Message(Error(code, reason), reply_to=task.message)

    # ---- ends
    def _end_late(self) -> None:
        """Replace workers that are past their deadline."""
        now = time.monotonic()
        for worker in list(self._pool.workers):
            if worker.tasks and now - worker.since >= self._timeout:
                task = worker.take()
                self._done[task.index] = no_reply(task.message, self._timeout)
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
        failed = [RayTask(index, message, None) for index, message in self._queues.pop(node.node_id, ())]
        for worker in lost:
            own = [task for task in worker.tasks if self._is_pinned(task.message)]
            failed += own
            worker.tasks = deque(task for task in worker.tasks if task not in own)
            self._retry(worker, f"{node.name} died")
        for task in failed:
            self._fail(task, CRASHED, reason)

    def _retry(self, worker: RayWorker, reason: str) -> None:
        """Queue the tasks of a dead worker again; the one that it worked on fails if it has failed before."""
        if worker.tasks and worker.tasks[0].index in self._tried:
            self._fail(worker.tasks.popleft(), CRASHED, f"the client's process died twice ({reason})")
        if worker.tasks:
            self._tried.add(worker.tasks[0].index)
            names = names_of(task.message for task in worker.tasks)
            log.warning("a worker on %s died (%s); tried again: %s", worker.node.name, reason, names)
        self._return(worker.tasks)

    def _return(self, tasks: deque[RayTask]) -> None:
        """Put tasks back in front of their queues."""
        for task in reversed(tasks):
            self._queue_of(task.message).appendleft((task.index, task.message))
