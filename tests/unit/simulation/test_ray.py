"""The Ray engine without Ray: frames, places, and messages whose actors die, are late or lose states."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count as count_up
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedlp.config import compose
from fedlp.errors import ConfigError, FedLPError
from fedlp.federation import flower_compat
from fedlp.simulation.parcel import HandOver
from fedlp.simulation.ray_cluster import RayNode, find_nodes, place_actors
from fedlp.simulation.ray_exchange import RayExchange
from fedlp.simulation.ray_frames import LooseBuffers, SharedImages, decode_reply, encode_reply, make_image
from fedlp.simulation.ray_pool import RayPool, RayWorker
from fedlp.simulation.transport import decode_frame, encode_frame

NODES = [RayNode("a", "node 1 (10.0.0.1)", 2), RayNode("b", "node 2 (10.0.0.2)", 1)]
TRAIN = "train"


class RayError(Exception): ...


class RayTaskError(RayError): ...


@dataclass(eq=False)
class Reference:
    value: Any = None
    error: Exception | None = None
    is_ready: bool = True


@dataclass
class FakeRay:
    """Ray with actors that echo; ``fate`` says what becomes of a message: an error, "silence", or None."""

    fate: Callable[[str, int], Exception | str | None]
    dead: set[str] = field(default_factory=set)
    sees_mark: bool = True

    def __post_init__(self) -> None:
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        affinity = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node_id, soft: node_id)
        self.util = SimpleNamespace(scheduling_strategies=affinity)
        self.served: list[tuple[str, int]] = []

    def remote(self, **options: Any) -> Callable[[type], Any]:
        def make(scheduling_strategy: str) -> Any:
            return SimpleNamespace(remote=lambda: self.actor(scheduling_strategy))

        return lambda kind: SimpleNamespace(options=make)

    def actor(self, node_id: str) -> Any:
        def begin(text: str, *arrays: Any) -> Reference:
            if node_id in self.dead:
                return Reference(error=RayError("The actor's node has died."))
            return Reference(json.dumps({"error": None, "sees_mark": self.sees_mark}))

        def answer(frame: bytes, image: Any) -> Reference:
            ((about, content),) = decode_frame(frame, LooseBuffers(memoryview(image)), flower_compat.make_array)
            client_id = about["node_id"] - 1
            self.served.append((node_id, client_id))
            fate = RayError("The actor died.") if node_id in self.dead else self.fate(node_id, client_id)
            if fate is not None:
                return Reference(error=fate if isinstance(fate, Exception) else None, is_ready=fate != "silence")
            up = LooseBuffers()
            reply = encode_frame([({"error": None}, content)], up)
            return Reference(encode_reply(reply, up.written, ["a line"] if client_id == 0 else []))

        return SimpleNamespace(begin=SimpleNamespace(remote=begin), answer=SimpleNamespace(remote=answer))

    def put(self, value: Any) -> Any:
        return value

    def get(self, reference: Reference) -> Any:
        if reference.error is not None:
            raise reference.error
        return reference.value

    def wait(self, references: list[Reference], num_returns: int, timeout: float | None = None) -> Any:
        ready = [one for one in references if one.is_ready][:num_returns]
        assert ready or timeout is not None, "the exchange would wait for ever"
        return ready, [one for one in references if one not in ready]

    def kill(self, actor: Any, no_restart: bool) -> None: ...

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": node.node_id, "Alive": node.node_id not in self.dead} for node in NODES]


def messages_for(count: int, ttl: float = 100.0) -> list[Message]:
    content = RecordDict({"about": ConfigRecord({"n": 1})})
    return [Message(content, i + 1, TRAIN, group_id="1", ttl=ttl) for i in range(count)]


def exchange(
    ray: FakeRay, count: int = 6, pins: bool = False, timeout: float = float("inf")
) -> tuple[RayPool, Iterator[Message]]:
    """Return a pool of three actors on two nodes, and the replies to one message for each client."""
    pool, found = exchange_of(ray, count, pins)
    return pool, found.stream(iter(messages_for(count)), timeout)


def exchange_of(ray: FakeRay, count: int = 6, pins: bool = False) -> tuple[RayPool, RayExchange]:
    """Return a pool of three actors on two nodes, and an exchange with them."""
    flower_compat.become_server()
    pool = RayPool(ray, place_actors(NODES, 3), 0.0, HandOver("module:app", {}), {}, count, None)
    pool.pins = pins

    def submit(worker: RayWorker, message: Message) -> object:
        about = {"node_id": message.metadata.dst_node_id}
        return worker.actor.answer.remote(encode_frame([(about, message.content)], LooseBuffers()), b"")

    numbers = count_up(1)
    return pool, RayExchange(pool, lambda _: next(numbers), submit, 2)


def clients_of(replies: list[Message]) -> list[int]:
    return [reply.metadata.src_node_id - 1 for reply in replies if not reply.has_error()]


def reasons(replies: list[Message]) -> dict[int, str]:
    return {i: reply.error.reason for i, reply in enumerate(replies) if reply.has_error()}


# ---- exchanges
def test_replies_come_in_order_with_the_lines_of_clients(caplog: pytest.LogCaptureFixture) -> None:
    ray = FakeRay(lambda node, client: None)
    _, replies = exchange(ray)
    assert clients_of(list(replies)) == list(range(6))
    assert {node for node, _ in ray.served} == {"a", "b"}
    assert caplog.messages == ["a line"]


def test_a_dead_actors_message_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []

    def fate(node: str, client: int) -> Exception | None:
        tries.append(client)
        return RayError("The actor died.") if client == 3 and tries.count(3) == 1 else None

    pool, replies = exchange(FakeRay(fate))
    assert clients_of(list(replies)) == list(range(6))
    assert any("(The actor died.); tried again: client 3" in line or "clients" in line for line in caplog.messages)
    assert len(pool.workers) == 3


def test_a_client_whose_process_dies_twice_loses_the_round() -> None:
    _, replies = exchange(FakeRay(lambda node, client: RayError("The actor died.") if client == 3 else None))
    found = list(replies)
    assert clients_of(found) == [0, 1, 2, 4, 5]
    assert reasons(found) == {3: "the client's process died twice (The actor died.)"}


def test_an_error_of_the_actor_is_the_clients() -> None:
    raised = RayTaskError("Traceback:\n  File x\nValueError: no such frame\n")
    _, replies = exchange(FakeRay(lambda node, client: raised if client == 2 else None))
    assert reasons(list(replies)) == {2: "ValueError: no such frame"}


def test_a_dead_node_is_named_and_its_clients_run_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    ray = FakeRay(lambda node, client: None)
    pool, replies = exchange(ray, 12)
    ray.dead.add("b")  # after its actor was greeted
    assert clients_of(list(replies)) == list(range(12))
    assert "node 2 (10.0.0.2) of the Ray cluster died, and its workers with it" in caplog.messages
    assert {worker.node.node_id for worker in pool.workers} == {"a"}


def test_a_dead_node_costs_the_clients_whose_states_it_held_the_round() -> None:
    ray = FakeRay(lambda node, client: None)
    pool, replies = exchange(ray, 6, pins=True)
    homes = [pool.home(i) for i in range(6)]
    assert [node.node_id for node in homes if node is not None] == ["a", "b", "a"] * 2
    ray.dead.add("b")
    found = list(replies)
    reason = "node 2 (10.0.0.2) of the Ray cluster died with the client's state"
    assert reasons(found) == {1: reason, 4: reason}
    assert not {client for node, client in ray.served if node == "a"} & {1, 4}
    assert pool.home(1) == NODES[0]


def test_clients_with_states_stay_on_their_nodes() -> None:
    ray = FakeRay(lambda node, client: None)
    _, replies = exchange(ray, 6, pins=True)
    list(replies)
    assert {(node, client) for node, client in ray.served} == {
        ("a", 0),
        ("b", 1),
        ("a", 2),
        ("a", 3),
        ("b", 4),
        ("a", 5),
    }


def test_pushed_messages_are_answered_as_actors_give_replies() -> None:
    ray = FakeRay(lambda node, client: "silence" if client == 0 else None)
    _, exchange = exchange_of(ray)
    numbers = exchange.push(messages_for(6, ttl=0.3))
    found = exchange.pull(numbers, 0.0)
    assert found
    assert 0 not in clients_of(found)
    (other,) = exchange.stream(iter(messages_for(2)[1:]), 100.0)
    assert clients_of([other]) == [1]
    while len(found) < 6:
        found += exchange.pull(numbers, 0.05)
    assert sorted(clients_of(found)) == [1, 2, 3, 4, 5]
    assert [reply.error.reason for reply in found if reply.has_error()] == ["no reply within 0.3 s"]
    assert exchange.pull(numbers, 0.0) == []


def test_a_stream_that_is_given_up_leaves_pushed_messages() -> None:
    _, exchange = exchange_of(FakeRay(lambda node, client: None))
    numbers = exchange.push(messages_for(2))
    stream = exchange.stream(iter(messages_for(20)), 100.0)
    next(stream)
    stream.close()
    found = exchange.pull(numbers, 0.0)
    while len(found) < 2:
        found += exchange.pull(numbers, 0.0)
    assert sorted(clients_of(found)) == [0, 1]


def test_no_node_is_left() -> None:
    ray = FakeRay(lambda node, client: None)
    _, replies = exchange(ray)
    ray.dead |= {"a", "b"}
    with pytest.raises(FedLPError, match="of the Ray cluster died, and no other is left"):
        list(replies)


def test_a_silent_client_is_late_and_its_actor_replaced() -> None:
    ray = FakeRay(lambda node, client: "silence" if client == 1 else None)
    pool, replies = exchange(ray, timeout=0.01)
    found = list(replies)
    assert reasons(found) == {1: "no reply within 0.01 s"}
    assert len(pool.workers) == 3


def test_an_actor_that_cannot_serve_is_named() -> None:
    with pytest.raises(FedLPError, match=r"^node 2 \(10\.0\.0\.2\) of the Ray cluster cannot run clients: The actor's"):
        exchange(FakeRay(lambda node, client: None, dead={"b"}))


# ---- frames
def test_a_reply_and_its_buffers_round_trip() -> None:
    arrays = [bytes(range(100)), b"", np.arange(70, dtype=np.float32).tobytes()]
    frame, buffers, said = decode_reply(encode_reply(b"frame", arrays, ["said"]))
    assert (frame, said) == (b"frame", ["said"])
    assert [bytes(view) for view in buffers.read([100, 0, 280])] == arrays


def test_large_arrays_travel_apart() -> None:
    record = ArrayRecord({"x": Array(np.arange(10_000, dtype=np.float32))})
    down = LooseBuffers()
    frame = encode_frame([({"node_id": 1}, RecordDict({"params": record}))], down)
    assert len(frame) < 1000
    image = make_image(down.written)
    image.flags.writeable = False  # as in the object store
    ((_, content),) = decode_frame(frame, LooseBuffers(memoryview(image)), flower_compat.make_array)
    assert content is not None
    assert bytes(content["params"]["x"].data) == bytes(record["x"].data)  # type: ignore[index, union-attr]


def test_images_are_stored_once_and_dropped_when_unused() -> None:
    stored: list[Any] = []

    def put(image: Any) -> int:
        stored.append(image)
        return len(stored)

    images = SharedImages(put, most_bytes=1000)
    one, two, large = (b"x" * 64,), (b"y" * 64,), (b"z" * 960,)
    assert [images.refer(one), images.refer(two), images.refer(one)] == [1, 2, 1]
    images.sweep()
    assert images.refer(one) == 1
    images.sweep()
    assert images.refer(two) == 3  # the last exchange did not use it
    assert images.refer(large) == 4
    assert images.refer(one) == 5  # it had to make room
    assert len(stored) == 5


# ---- places
def test_actors_are_spread_over_nodes_in_the_order_of_addresses() -> None:
    def node(name: str, address: str, **resources: float) -> dict[str, Any]:
        return {"NodeID": name, "NodeName": name, "NodeManagerAddress": address, "Alive": True, "Resources": resources}

    ray = SimpleNamespace(
        nodes=lambda: [node("y", "10.0.0.2", CPU=4, GPU=1), node("x", "10.0.0.1", CPU=1.5), node("z", "10.0.0.3")]
    )
    found = find_nodes(ray, 0.0)
    assert [(one.node_id, one.slots) for one in found] == [("x", 1), ("y", 4)]
    assert [one.node_id for one in place_actors(found, 4)] == ["x", "y", "y", "y"]
    assert [(one.node_id, one.slots) for one in find_nodes(ray, 0.3)] == [("y", 3)]
    with pytest.raises(ConfigError, match="no node of the Ray cluster has 1 CPU and 2 GPU for a client"):
        find_nodes(ray, 2.0)


# ---- options
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["simulation.address=auto"], "simulation.address=auto is not allowed: it must be null with simulation=local"),
        (["simulation=flower", "simulation.gpus_per_client=1"], "must be null with simulation=flower"),
        (["simulation=ray", "simulation.address=somewhere"], "must be null, auto or HOST:PORT"),
        (["simulation=ray", "simulation.address=ray://head:10001"], "must be null, auto or HOST:PORT"),
        (["simulation=ray", "simulation.gpus_per_client=0.5"], "above 0 with device=cuda"),
        (["simulation=ray", "simulation.gpus_per_client=1.5", "device=cuda"], r"in \[0, 1\], or a whole number"),
        (["simulation=ray", "device=cuda:1"], "cpu or cuda with simulation=ray"),
        (["simulation=ray", "simulation.object_store_bytes=1000"], "at least 78643200"),
        (["simulation=ray", "simulation.address=auto", "simulation.object_store_bytes=100000000"], "must be null with"),
        (["simulation=ray", "simulation.workers=0"], "at least 1"),
    ],
)
def test_options_that_do_not_fit(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose(overrides)
