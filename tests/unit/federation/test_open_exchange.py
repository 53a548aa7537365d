"""Replies are taken as they come, whatever the order; one that nobody waits for is not read."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import pytest
from flwr.app import Error, Message, RecordDict

from fedlp.federation import flower_compat
from fedlp.federation.server import exchange as exchanging
from fedlp.federation.server import open_exchange, reply_polling
from fedlp.federation.server.open_exchange import OpenExchange

TIMEOUT = 100.0
Answered = list[tuple[int, str]]


class ScriptedGrid:
    """Gives the replies of its script, one batch for each time that the server has waited."""

    def __init__(self, *script: Iterable[Message]) -> None:
        self.script = [list(batch) for batch in script]
        self.sent: dict[str, Message] = {}
        self.unknown: set[int] = set()
        self.seconds = 0.0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        keys = []
        for message in messages:
            node = message.metadata.dst_node_id
            keys.append("" if node in self.unknown else f"message-{node}")
            flower_compat.set_message_id(message, keys[-1])
            self.sent[keys[-1]] = message
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return self.script[0] if self.script else []

    def wait(self, seconds: float) -> None:
        self.seconds += 10.0
        self.script = self.script[1:]


def message(node: int) -> Message:
    return Message(RecordDict(), node, "train")


def reply(node: int, error: str = "", to: str = "") -> Message:
    """Return the reply of a node, or one to another message."""
    sent = flower_compat.make_instruction(RecordDict(), to or f"message-{node}", node, "train", "1")
    return Message(Error(2, error), reply_to=sent) if error else Message(RecordDict(), reply_to=sent)


def open_on(grid: ScriptedGrid, monkeypatch: pytest.MonkeyPatch) -> OpenExchange:
    flower_compat.become_server()
    monkeypatch.setattr(reply_polling, "_REST_S", 0.0)
    monkeypatch.setattr(exchanging, "_POLL_S", 0.0)
    monkeypatch.setattr(
        open_exchange, "time", SimpleNamespace(monotonic=lambda: grid.seconds, sleep=lambda s: grid.wait(s))
    )
    return OpenExchange(grid, TIMEOUT)  # type: ignore[arg-type]


def take(exchange: OpenExchange) -> Answered:
    found = exchange.take()
    return [(sent.metadata.dst_node_id, got.error.reason if got.has_error() else "good") for sent, got in found]


def test_replies_come_in_the_order_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    flower_compat.become_server()
    grid = ScriptedGrid([], [reply(3)], [reply(1), reply(2, "ValueError: no data")])
    exchange = open_on(grid, monkeypatch)
    exchange.send([message(node) for node in (1, 2, 3)])
    assert take(exchange) == []
    assert take(exchange) == [(3, "good")]
    exchange.send([message(4)])
    grid.wait(0)
    assert sorted(take(exchange)) == [(1, "good"), (2, "ValueError: no data")]
    grid.script = [[reply(4)]]
    assert take(exchange) == [(4, "good")]


def test_duplicates_and_replies_to_other_messages_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    flower_compat.become_server()
    grid = ScriptedGrid([reply(1), reply(1), reply(7), reply(2, to="of another run")], [reply(1)], [reply(2)])
    exchange = open_on(grid, monkeypatch)
    exchange.send([message(1), message(2)])
    assert take(exchange) == [(1, "good")]
    grid.wait(0)
    assert take(exchange) == []
    assert take(exchange) == [(2, "good")]


def test_who_is_silent_is_given_up_and_its_late_reply_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    flower_compat.become_server()
    grid = ScriptedGrid(*[[]] * 11, [reply(1), reply(2)])
    exchange = open_on(grid, monkeypatch)
    exchange.send([message(1)])
    for _ in range(5):
        assert take(exchange) == []
    exchange.send([message(2)])  # its time begins now
    for _ in range(5):
        assert take(exchange) == []
    assert take(exchange) == [(1, "no reply within 100 s")]
    grid.wait(0)
    assert take(exchange) == [(2, "good")]
    assert take(exchange) == []


def test_a_node_that_the_grid_does_not_know_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ScriptedGrid([reply(1)])
    grid.unknown.add(2)
    exchange = open_on(grid, monkeypatch)
    exchange.send([message(1), message(2)])
    assert take(exchange) == [(2, "no such node"), (1, "good")]
