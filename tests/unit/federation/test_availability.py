"""Clients that come and go: traces, probabilities, drop-outs, the first answers of many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict

from fedlp.errors import DataError
from fedlp.federation import flower_compat
from fedlp.federation.server import exchange
from fedlp.federation.server.availability import Availability, draw_dropouts, make_availability, read_trace
from fedlp.federation.server.exchange import exchange_first
from fedlp.rng import Stream, generator


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


# ---- who is there
def test_a_trace_says_who_is_there(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace.csv", "client,from,to", "0,1,2", "0,5,", "2,2,3")
    there = make_availability(str(trace), seed=0)
    rounds = {number: there.present(number, [0, 1, 2]) for number in range(1, 7)}
    assert rounds == {1: [0], 2: [0, 2], 3: [2], 4: [], 5: [0], 6: [0]}


def test_a_trace_in_seconds(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace.csv", "client,from,to", "0,0,59.5", "1,60,120", "2,61,119", "2,150,", "3,1,10")
    there = make_availability(str(trace), seed=0, round_s=60)
    rounds = {number: there.present(number, [0, 1, 2, 3]) for number in range(1, 6)}
    assert rounds == {1: [0], 2: [1], 3: [1], 4: [2], 5: [2]}  # rounds begin at 0, 60, 120, ... seconds
    with pytest.raises(DataError, match=r"line 2.*numbers"):
        read_trace(write(tmp_path / "bad.csv", "client,from,to", "0,soon,9"), 60)
    never = read_trace(write(tmp_path / "late.csv", "client,from,to", "0,1e308,"), 1e-3)
    assert never == {0: ((float("inf"), float("inf")),)}, "a quotient beyond the floats"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("client,start,to", "0,1,2"), "no column from"),
        (("client,from,to", "0,1,2", "one,1,2"), "line 3.*whole numbers"),
        (("client,from,to", "0,4,2"), "line 2.*no stretch"),
        (("client,from,to", "-1,1,2"), "no stretch"),
        (("client,from,to", "0,1"), "is there from 1 to inf"),
        (("client,from,to",), "holds no stretch"),
    ],
)
def test_bad_traces_are_named(tmp_path: Path, lines: tuple[str, ...], words: str) -> None:
    path = write(tmp_path / "trace.csv", *lines)
    if "inf" in words:  # a short line has no end
        assert read_trace(path) == {0: ((1, float("inf")),)}
        return
    with pytest.raises(DataError, match=words):
        read_trace(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_trace(tmp_path / "nowhere.csv")


def test_a_probability_is_met_and_depends_on_round_and_client_alone() -> None:
    there = Availability(seed=1, probability=0.3)
    counts = [len(there.present(number, range(200))) for number in range(1, 6)]
    assert all(35 < count < 85 for count in counts)
    assert there.present(3, [7, 8, 9]) == [one for one in there.present(3, range(200)) if one in (7, 8, 9)]
    assert there.present(1, range(200)) != there.present(2, range(200))
    draws = [generator(there.seed, Stream.AVAILABILITY, 1, i).random() for i in range(200)]
    assert there.present(1, range(200)) == [i for i, draw in enumerate(draws) if draw < there.probability]
    assert Availability().present(1, range(5)) == range(5)


def test_dropouts_are_drawn_by_round_and_client() -> None:
    assert draw_dropouts(0, 1, range(100), 0.0) == frozenset()
    dropped = draw_dropouts(0, 1, range(100), 0.2)
    assert 5 < len(dropped) < 40
    assert draw_dropouts(0, 1, sorted(dropped), 0.2) == dropped


# ---- the first answers
class Streams:
    """A grid like the local engine: node ids below 10 fail."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def stream(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        for message in messages:
            self.asked.append(message.metadata.dst_node_id)
            bad = message.metadata.dst_node_id < 10
            yield Message(Error(2, "raised"), reply_to=message) if bad else Message(RecordDict(), reply_to=message)


def ask(*nodes: int) -> list[Message]:
    flower_compat.become_server()
    found = [Message(RecordDict(), node, "train") for node in nodes]
    for number, message in enumerate(found):
        message.metadata.__dict__["_message_id"] = str(number)
    return found


def outcome(replies: Iterable[Message]) -> list[int]:
    return [reply.error.code if reply.has_error() else 0 for reply in replies]


def test_the_first_in_a_given_order_are_taken_and_no_others_work() -> None:
    grid: Any = Streams()
    replies = exchange_first(grid, ask(11, 12, 13, 14), 9.0, 2, lambda count: [3, 1, 0, 2])
    assert outcome(replies) == [exchange.SURPLUS, 0, exchange.SURPLUS, 0]
    assert grid.asked == [12, 14]


def test_a_client_that_fails_is_replaced_by_the_next_one() -> None:
    grid: Any = Streams()
    replies = exchange_first(grid, ask(1, 12, 13, 2), 9.0, 2, lambda count: range(count))
    assert outcome(replies) == [2, 0, 0, exchange.SURPLUS]
    grid = Streams()
    assert outcome(exchange_first(grid, ask(1, 12, 2), 9.0, 2, lambda count: range(count))) == [2, 0, 2]


class Network:
    """A grid of which nodes answer one by one, in an order of their own."""

    def __init__(self, order: list[int]) -> None:
        self._order, self._sent = order, dict[str, Message]()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._sent = {str(message.metadata.dst_node_id): message for message in messages}
        return list(self._sent)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        waiting = set(message_ids)
        node = next((node for node in self._order if str(node) in waiting), None)
        if node is None:
            return []
        self._order.remove(node)
        reply = Message(RecordDict(), reply_to=self._sent[str(node)])
        reply.metadata.__dict__["_reply_to_message_id"] = str(node)
        return [reply]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pulls:
        def __init__(self, grid: Network) -> None:
            self._grid = grid

        def pull(self, message_ids: list[str]) -> list[Message]:
            return self._grid.pull_messages(message_ids)

    monkeypatch.setattr(exchange, "Puller", Pulls)
    monkeypatch.setattr(exchange, "_POLL_S", 0.0)


@pytest.mark.usefixtures("at_once")
def test_on_a_network_the_first_to_answer_are_taken() -> None:
    grid: Any = Network([13, 11, 12])
    replies = exchange_first(grid, ask(11, 12, 13), 9.0, 2, lambda count: range(count))
    assert outcome(replies) == [0, exchange.SURPLUS, 0]


@pytest.mark.usefixtures("at_once")
def test_who_stays_silent_is_no_surplus() -> None:
    grid: Any = Network([12])
    replies = exchange_first(grid, ask(11, 12, 13), 0.1, 2, lambda count: range(count))
    assert outcome(replies) == [exchange.NO_REPLY, 0, exchange.NO_REPLY]
