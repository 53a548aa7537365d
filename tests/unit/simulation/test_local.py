"""The local engine carries any Flower app: order, errors, deaths, deadlines, shared memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedlp.errors import FedLPError
from fedlp.simulation import local
from fedlp.simulation.local import LocalGrid


def make_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        what = message.content.config_records.get("do", ConfigRecord())
        client = int(context.node_config["partition-id"])
        if what.get("raise") == client:
            raise ValueError("the shard is empty\nsecond line")
        if what.get("die") == client:
            os._exit(7)
        if what.get("sleep") == client:
            time.sleep(30)
        if "slow-first" in what:
            time.sleep(0.2 if client == 0 else 0.0)
        if "sleep-first" in what:
            time.sleep(1.0 if client == 0 else 0.0)
        arrays = message.content.array_records["arrays"]
        out = {key: Array(array.numpy() + client) for key, array in arrays.items()}
        metrics = MetricRecord({"num-examples": client + 1, "pid": os.getpid()})
        return Message(RecordDict({"arrays": ArrayRecord(out), "metrics": metrics}), reply_to=message)

    @app.query("echo")
    def echo(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    return app


@pytest.fixture(params=[(1, 1), (3, 1), (2, 4)], ids=["1 worker", "3 workers", "cohorts of 4"])
def grid(request: pytest.FixtureRequest) -> Iterator[LocalGrid]:
    workers, cohort = request.param
    with LocalGrid(make_app, num_clients=6, num_workers=workers, message_bytes=1 << 17, cohort=cohort) as grid:
        yield grid


def instructions(count: int = 6, size: int = 5, **do: int) -> list[Message]:
    arrays = ArrayRecord({"w": Array(np.arange(size, dtype=np.float32))})
    return [
        Message(RecordDict({"arrays": arrays, "do": ConfigRecord(dict(do))}), node, "train")
        for node in range(1, count + 1)
    ]


@pytest.mark.parametrize("size", [5, 20_000])
def test_replies_come_in_order_whoever_is_slow(grid: LocalGrid, size: int) -> None:
    replies = list(grid.stream(instructions(size=size, **{"slow-first": 1}), timeout=60))
    for client, reply in enumerate(replies):
        np.testing.assert_array_equal(reply.content["arrays"]["w"].numpy(), np.arange(size, dtype=np.float32) + client)


def test_more_messages_than_slots_and_none_is_lost(grid: LocalGrid) -> None:
    batch = [message for _ in range(20) for message in instructions()]
    replies = list(grid.stream(iter(batch), timeout=60))
    assert [reply.content["metrics"]["num-examples"] for reply in replies] == [1, 2, 3, 4, 5, 6] * 20


def test_a_message_is_only_drawn_when_a_place_is_free(grid: LocalGrid) -> None:
    drawn = 0

    def source() -> Iterator[Message]:
        nonlocal drawn
        for message in instructions() * 40:
            drawn += 1
            yield message

    stream = grid.stream(source(), timeout=60)
    next(stream)
    assert drawn < 100
    list(stream)
    assert drawn == 240


def test_of_large_messages_one_reply_at_most_waits_for_an_earlier_one() -> None:
    drawn = 0

    def source() -> Iterator[Message]:
        nonlocal drawn
        for message in instructions(5, **{"sleep-first": 1}):
            drawn += 1
            yield message

    with LocalGrid(make_app, num_clients=6, num_workers=2, message_bytes=1 << 25) as grid:
        stream = grid.stream(source(), timeout=60)
        next(stream)
        assert drawn == 3
        assert len(list(stream)) == 4


def test_clients_that_share_no_message_keep_every_worker_busy_too() -> None:
    with LocalGrid(make_app, num_clients=6, num_workers=2, message_bytes=1 << 25, cohort=3, stacks=True) as grid:
        replies = list(grid.stream(instructions(**{"sleep-first": 1}), timeout=60))
    at = [reply.content["metrics"]["pid"] for reply in replies]
    assert len(set(at[:3])) == len(set(at[3:])) == 1, "three travel together"
    assert at[0] != at[3]


def test_every_kind_of_record_survives_the_way(grid: LocalGrid) -> None:
    config = ConfigRecord(
        {"s": "ä", "b": b"\x00\xff" * 9000, "i": 2**60, "f": 0.1, "t": True, "l": [1, 2], "bl": [b"a"]}
    )
    content = RecordDict({"c": config, "m": MetricRecord({"x": 1e-300, "y": [1.5, 2.5]}), "a": ArrayRecord()})
    (reply,) = grid.stream([Message(content, 1, "query.echo")], timeout=60)
    assert reply.content == content


def test_a_client_that_raises_is_an_error_reply_of_one_line(grid: LocalGrid) -> None:
    replies = list(grid.stream(instructions(**{"raise": 2}), timeout=60))
    assert [reply.has_error() for reply in replies] == [False, False, True, False, False, False]
    assert replies[2].error.reason == "ValueError: the shard is empty"


def test_a_process_that_dies_is_replaced_and_only_its_client_fails(grid: LocalGrid) -> None:
    replies = list(grid.stream(instructions(die=1), timeout=60))
    assert [reply.has_error() for reply in replies] == [False, True, False, False, False, False]
    assert "exit code 7" in str(replies[1].error.reason)
    assert not any(reply.has_error() for reply in grid.stream(instructions(), timeout=60))


def test_a_client_that_is_silent_is_given_up(grid: LocalGrid) -> None:
    replies = list(grid.stream(instructions(sleep=3), timeout=1.0))
    assert [reply.has_error() for reply in replies] == [False, False, False, True, False, False]
    assert replies[3].error.reason == "no reply within 1 s"


def test_a_message_beyond_the_slots_is_refused(grid: LocalGrid) -> None:
    with pytest.raises(FedLPError, match="larger than the engine's slots"):
        list(grid.stream(instructions(size=400_000), timeout=60))


def test_flowers_own_fedavg_runs_on_it(grid: LocalGrid) -> None:
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=6, min_available_nodes=6)
    result = strategy.start(grid, ArrayRecord({"w": Array(np.zeros(3, dtype=np.float32))}), num_rounds=2)
    mean = np.average(np.arange(6), weights=np.arange(1, 7))
    np.testing.assert_allclose(result.arrays["w"].numpy(), np.full(3, 2 * mean), rtol=1e-6)


def pull_all(grid: LocalGrid, ids: list[str]) -> list[Message]:
    """Return the replies to pushed messages in the order in which they came."""
    found: list[Message] = []
    while len(found) < len(ids):
        found += grid.pull_messages(ids)
    return found


def test_pushed_messages_are_answered_while_the_server_does_other_things(grid: LocalGrid) -> None:
    ids = list(grid.push_messages(instructions(**{"slow-first": 1})))
    (other,) = grid.stream([Message(RecordDict({"m": MetricRecord({"x": 1.5})}), 3, "query.echo")], timeout=60)
    assert other.content["m"]["x"] == 1.5
    found = pull_all(grid, ids)
    assert sorted(reply.content["metrics"]["num-examples"] for reply in found) == [1, 2, 3, 4, 5, 6]
    assert {reply.metadata.reply_to_message_id for reply in found} == {*ids}
    assert list(grid.pull_messages(ids)) == []


def test_pushed_messages_have_their_own_deadline_and_failures() -> None:
    with LocalGrid(make_app, num_clients=6, num_workers=2, message_bytes=1 << 17) as grid:
        sent = instructions(4, sleep=1, die=2)
        slow = Message(sent[1].content, 2, "train", ttl=0.5)
        ids = list(grid.push_messages([sent[0], slow, sent[2], sent[3]]))
        found = {reply.metadata.reply_to_message_id: reply for reply in pull_all(grid, ids)}
    assert [found[key].has_error() for key in ids] == [False, True, True, False]
    assert found[ids[1]].error.reason == "no reply within 0.5 s"
    assert "exit code 7" in str(found[ids[2]].error.reason)


@pytest.mark.slow
def test_spawned_workers_do_the_same() -> None:
    with LocalGrid(make_app, num_clients=6, num_workers=2, message_bytes=1 << 17, start="spawn") as grid:
        test_replies_come_in_order_whoever_is_slow(grid, 20_000)
        test_more_messages_than_slots_and_none_is_lost(grid)
        test_every_kind_of_record_survives_the_way(grid)
        test_pushed_messages_are_answered_while_the_server_does_other_things(grid)
        test_a_client_that_raises_is_an_error_reply_of_one_line(grid)
        test_a_process_that_dies_is_replaced_and_only_its_client_fails(grid)
        test_a_client_that_is_silent_is_given_up(grid)
        test_a_message_beyond_the_slots_is_refused(grid)
        test_flowers_own_fedavg_runs_on_it(grid)


def test_clients_in_this_process_do_the_same() -> None:
    with LocalGrid(make_app, num_clients=6, num_workers=0, message_bytes=1 << 17) as grid:
        test_replies_come_in_order_whoever_is_slow(grid, 20_000)
        test_more_messages_than_slots_and_none_is_lost(grid)
        test_a_message_is_only_drawn_when_a_place_is_free(grid)
        test_every_kind_of_record_survives_the_way(grid)
        test_pushed_messages_are_answered_while_the_server_does_other_things(grid)
        test_a_client_that_raises_is_an_error_reply_of_one_line(grid)
        test_a_message_beyond_the_slots_is_refused(grid)
        test_flowers_own_fedavg_runs_on_it(grid)
        (reply,) = grid.stream(instructions(1), timeout=60)
        assert reply.content["metrics"]["pid"] == os.getpid()


@pytest.mark.parametrize("cohort", [1, 4])
def test_a_late_answer_in_this_process_is_no_reply(cohort: int, monkeypatch: pytest.MonkeyPatch) -> None:
    app, clock = ClientApp(), [0.0]
    monkeypatch.setattr(local, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        clock[0] += 10.0 if context.node_config["partition-id"] == 2 else 1.0
        return Message(message.content, reply_to=message)

    with LocalGrid(lambda: app, num_clients=6, num_workers=0, message_bytes=1 << 17, cohort=cohort) as grid:
        replies = list(grid.stream(instructions(), timeout=2.0))
    assert [reply.has_error() for reply in replies] == [False, False, True, False, False, False]
    assert replies[2].error.reason == "no reply within 2 s"


def test_training_in_this_process_leaves_its_random_numbers_and_threads() -> None:
    app = ClientApp()
    seen = []

    @app.query("draw")
    def draw(message: Message, context: Context) -> Message:
        torch.manual_seed(0)
        seen.append(torch.get_num_threads())
        return Message(message.content, reply_to=message)

    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with LocalGrid(lambda: app, num_clients=1, num_workers=0, message_bytes=1 << 10) as grid:
            list(grid.stream([Message(RecordDict(), 1, "query.draw")], timeout=60))
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
