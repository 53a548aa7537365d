"""Actors of a run on the nodes of a Ray cluster, as the server sees them."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from fedlp import __version__
from fedlp.errors import FedLPError, printable
from fedlp.simulation.parcel import HandOver
from fedlp.simulation.ray_actor import RayActor
from fedlp.simulation.ray_cluster import RayNode
from fedlp.simulation.worker import RunSettings

log = logging.getLogger("fedlp")

_PATIENCE_S = 30.0


@dataclass(frozen=True, eq=False)
class RayTask:
    """A message in flight: its number, the seconds that it may take, and the reference to its reply."""

    number: int
    message: Message
    timeout: float
    reply: Any


@dataclass(eq=False)
class RayWorker:
    """An actor, its node, and its tasks in order.

    Attributes
    ----------
    hello : reference or None
        To what the actor says once it is ready, until that is read.
    since : float
        When the first task became the first.
    """

    actor: Any
    node: RayNode
    hello: Any
    tasks: deque[RayTask] = field(default_factory=deque)
    since: float = 0.0

    @property
    def awaited(self) -> Any:
        """Reference to the actor's next answer; None if it has nothing to do."""
        return self.hello if self.hello is not None else self.tasks[0].reply if self.tasks else None

    def give(self, task: RayTask) -> None:
        """Add a task that was sent."""
        if not self.tasks:
            self.since = time.monotonic()
        self.tasks.append(task)

    def take(self) -> RayTask:
        """Return the first task, and remove it."""
        task = self.tasks.popleft()
        self.since = time.monotonic()
        return task


class RayPool:
    """Actors of one CPU each.

    Parameters
    ----------
    ray : module
    places : list of RayNode
        Node of each actor.
    gpus_per_actor : float
        GPUs of an actor, >= 0.
    content : HandOver
        What makes the ClientApp; its arrays are put into the object store.
    run_config : dict
        Content of ``Context.run_config``.
    mark : str or None
        File in the folder that holds clients' states. Where a node does not see it, clients stay on their nodes.

    Raises
    ------
    FedLPError
        If an actor cannot serve.
    """

    def __init__(
        self,
        ray: Any,
        places: list[RayNode],
        gpus_per_actor: float,
        content: HandOver,
        run_config: RunSettings,
        num_clients: int,
        mark: str | None,
    ) -> None:
        self.ray, self.workers = ray, list[RayWorker]()
        self._places, self._gone = places, set[str]()
        self._make = ray.remote(num_cpus=1, num_gpus=gpus_per_actor, max_restarts=0)(RayActor)
        self._arrays = [self.put(np.ascontiguousarray(array)) for array in content.arrays.values()]
        about: dict[str, Any] = {"maker": content.maker, "about": content.about, "arrays": list(content.arrays)}
        about |= {"version": __version__, "run_config": run_config, "num_clients": num_clients, "mark": mark}
        self._about = json.dumps(about)
        try:
            for node in places:
                self.start(node)
            self._await_all()
            sees_mark = [self.greet(worker) for worker in self.workers]
        except BaseException:
            self.close()
            raise
        self.pins = mark is not None and not all(sees_mark)

    def put(self, array: NDArray[Any]) -> Any:
        """Put an array into the object store; return a reference. FedLPError if there is no room."""
        try:
            return self.ray.put(array)
        except self.ray.exceptions.RayError as error:
            raise FedLPError(
                f"Ray's object store has no room for {array.nbytes} bytes ({reason_of(error)}); set "
                "simulation.object_store_bytes, or start the nodes with a larger --object-store-memory"
            ) from error

    def start(self, node: RayNode) -> None:
        """Start an actor on a node, without waiting for it."""
        there = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        actor = self._make.options(scheduling_strategy=there).remote()
        self.workers.append(RayWorker(actor, node, actor.begin.remote(self._about, *self._arrays)))

    def _await_all(self) -> None:
        waiting = [worker.hello for worker in self.workers]
        _, waiting = self.ray.wait(waiting, num_returns=len(waiting), timeout=_PATIENCE_S)
        if waiting:
            log.warning("waiting for %d of %d CPUs of the Ray cluster", len(waiting), len(self.workers))
            self.ray.wait(waiting, num_returns=len(waiting))

    def greet(self, worker: RayWorker) -> bool:
        """Read what a ready actor says; return whether it sees the mark. FedLPError if it cannot serve."""
        try:
            said = json.loads(self.ray.get(worker.hello))
        except self.ray.exceptions.RayError as error:
            raise FedLPError(f"{worker.node.name} of the Ray cluster cannot run clients: {reason_of(error)}") from error
        if said["error"] is not None:
            raise FedLPError(f"{worker.node.name} of the Ray cluster cannot run clients: {said['error']}")
        worker.hello = None
        return bool(said["sees_mark"])

    def drop(self, worker: RayWorker) -> None:
        """End an actor."""
        with suppress(self.ray.exceptions.RayError, ValueError):
            self.ray.kill(worker.actor, no_restart=True)
        self.workers.remove(worker)

    def is_alive(self, node: RayNode) -> bool:
        """Return whether Ray counts a node as alive, and no actor failed to start there."""
        alive = {found["NodeID"] for found in self.ray.nodes() if found["Alive"]}
        return node.node_id in alive and node.node_id not in self._gone

    def give_up(self, node: RayNode) -> list[RayWorker]:
        """Use a node no more; return its workers, which are dropped."""
        self._gone.add(node.node_id)
        lost = [worker for worker in self.workers if worker.node == node]
        for worker in lost:
            self.drop(worker)
        return lost

    def home(self, client_id: int) -> RayNode | None:
        """Return the node of a client whose state is on a node's own disk: the same as long as that lives."""
        count = len(self._places)
        places = (self._places[(client_id + step) % count] for step in range(count))
        return next((node for node in places if node.node_id not in self._gone), None)

    def close(self) -> None:
        """End all actors."""
        for worker in list(self.workers):
            self.drop(worker)


def reason_of(error: BaseException) -> str:
    """Return the reason of an error of Ray's in one line: of a traceback in it the last line."""
    raised = re.findall(r"^\s*(\w*Error: .+)$", str(error), re.MULTILINE)
    return printable(raised[-1] if raised else str(error))


def names_of(messages: Iterable[Message]) -> str:
    """Return the clients that messages are for, such as ``clients 3, 7``."""
    ids = sorted({message.metadata.dst_node_id - 1 for message in messages})
    return f"client{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids))}"
