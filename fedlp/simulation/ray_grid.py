"""The Ray engine: a Flower Grid in this process, clients in Ray actors of one CPU each, on one or many nodes.

Messages keep Flower's form and go to the same ClientApp as on any other engine, in the frames of the local engine. The
arrays of instructions go through Ray's object store: those that clients share once a round, and once to each node; so
does the data set, once a run. Actors stay on their nodes. A client runs on any node, unless its state (residuals,
personal heads, frozen tensors, secrets) lies in a folder that the nodes do not share: then it has one node.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from flwr.app import Message

from fedlp.federation.server.roster import Profiles
from fedlp.simulation.parcel import HandOver
from fedlp.simulation.ray_cluster import RaySettings, find_nodes, place_actors, ray_of
from fedlp.simulation.ray_exchange import RayExchange
from fedlp.simulation.ray_frames import LooseBuffers, SharedImages
from fedlp.simulation.ray_pool import RayPool, RayWorker
from fedlp.simulation.streamed_grid import PULL_S, StreamedGrid
from fedlp.simulation.transport import encode_frame
from fedlp.simulation.worker import RunSettings, keep_freed_memory
from fedlp.training.threads import count_cores

log = logging.getLogger("fedlp")

_SMALL_BYTES = 1 << 20
_STORE_SHARE = 4  # of the object store, a quarter at most holds instructions


class RayGrid(StreamedGrid):
    """Flower's Grid over Ray actors.

    Parameters
    ----------
    content : HandOver
        What makes the ClientApp in an actor.
    settings : RaySettings
    num_clients : int
        Nodes of the grid; node ``i + 1`` is the client of partition ``i``.
    most_workers : int
        Actors beyond which none has work.
    message_bytes : int
        Bytes of the arrays of one message, roughly.
    run_config : dict
        Content of ``Context.run_config``.
    state_dir : Path, optional
        Folder under which clients keep states from round to round; none do if absent.
    profiles : callable, optional
        Returns the profiles of all clients; without it, nodes are asked.

    Raises
    ------
    ConfigError
        If there is no such cluster, or it has no room for a client.
    FedLPError
        If Ray or an actor cannot start.

    Use as a context manager: actors, and a private Ray, end with it.
    """

    def __init__(
        self,
        content: HandOver,
        settings: RaySettings,
        num_clients: int,
        most_workers: int,
        message_bytes: int,
        run_config: RunSettings | None = None,
        state_dir: Path | None = None,
        profiles: Callable[[], Profiles] | None = None,
    ) -> None:
        keep_freed_memory()  # of one update for the next
        super().__init__(num_clients, profiles)
        self._depth = 8 if message_bytes <= _SMALL_BYTES else 2  # messages an actor may have waiting
        count = most_workers if settings.workers is None else min(settings.workers, most_workers)
        self._stack = ExitStack()
        try:
            self._pool = self._start(content, settings, count, run_config or {}, state_dir)
        except BaseException:
            self._stack.close()
            raise
        if self._pool.pins:
            log.warning(
                "the nodes of the Ray cluster do not share %s: each client stays on one node, "
                "and its state is lost with that",
                state_dir,
            )

    def _start(
        self, content: HandOver, settings: RaySettings, count: int, run_config: RunSettings, state_dir: Path | None
    ) -> RayPool:
        """Start or join Ray, and start the actors; both end with the stack."""
        ray = self._stack.enter_context(ray_of(settings, min(count, settings.workers or count_cores())))
        places = place_actors(find_nodes(ray, settings.gpus_per_actor), count)
        with _Mark(state_dir) as mark:
            pool = RayPool(ray, places, settings.gpus_per_actor, content, run_config, self._num_clients, mark)
        self._stack.callback(pool.close)
        store = min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"])
        self._images = SharedImages(pool.put, int(store) // _STORE_SHARE)
        self._exchange = RayExchange(pool, self._number, self._submit, self._depth)
        return pool

    def __enter__(self) -> RayGrid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def stream(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Yield one reply per message, in order, while actors answer later ones.

        Parameters
        ----------
        timeout : float
            Deadline of an actor for one message; it is then replaced and the reply is an error.
        """
        yield from self._exchange.stream(iter(messages), timeout)
        self._images.sweep()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages for actors, which may take the time to live of each."""
        return [str(number) for number in self._exchange.push(messages)]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come to these messages, each once; wait a moment for one."""
        return self._exchange.pull(map(int, message_ids), PULL_S)

    def _submit(self, worker: RayWorker, message: Message) -> object:
        """Send a message to a worker; return the reference to its reply."""
        buffers = LooseBuffers()
        frame = encode_frame([self._item(message)], buffers)
        image = self._images.refer(buffers.written) if buffers.written else b""
        reference: object = worker.actor.answer.remote(frame, image)
        return reference


class _Mark:
    """A file that shows whether nodes share a folder; None without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / f".shared-{secrets.token_hex(8)}"

    def __enter__(self) -> str | None:
        if self._path is None:
            return None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        return str(self._path)

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
