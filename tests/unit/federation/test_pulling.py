"""Replies are pulled past one that is still being sent, and each is counted once."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict

from fedlp.federation import flower_compat
from fedlp.federation.server import exchange as exchanging
from fedlp.federation.server import reply_polling as pulling
from fedlp.federation.server.exchange import exchange
from fedlp.federation.server.reply_polling import Puller

UNKNOWN = 3  # Flower's code for a message that it does not know, or no more


class FlowersGrid:
    """Hands out a reply once, as soon as it is announced, and then waits for its content."""

    def __init__(self) -> None:
        flower_compat.become_server()
        self.messages: dict[str, Message] = {}
        self.announced: dict[str, tuple[Message, threading.Event]] = {}

    def push_messages(self, messages: Collection[Message]) -> list[str]:
        for i, message in enumerate(messages):
            flower_compat.set_message_id(message, f"message-{i}")
            self.messages[f"message-{i}"] = message
        return list(self.messages)

    def announce(self, i: int, reply: RecordDict | Error) -> threading.Event:
        """Let a reply be known; it is whole when the event is set."""
        whole = threading.Event()
        key = f"message-{i}"
        self.announced[key] = Message(reply, reply_to=self.messages[key]), whole  # type: ignore[call-overload]
        return whole

    def pull_messages(self, message_ids: Collection[str]) -> Iterator[Message]:
        found = [self.announced.pop(key) for key in message_ids if key in self.announced]
        unknown = [key for key in message_ids if key not in self.messages]
        for reply, _ in found:
            del self.messages[reply.metadata.reply_to_message_id]
        replies = [reply for reply, whole in found if whole.wait(20)]
        return iter([*replies, *(error_for(key) for key in unknown)])


def error_for(key: str) -> Message:
    message = flower_compat.make_instruction(RecordDict(), key, 7, "train", "1")
    return Message(Error(UNKNOWN, "unknown"), reply_to=message)


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> FlowersGrid:
    monkeypatch.setattr(pulling, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(pulling, "_REST_S", 0.0)
    monkeypatch.setattr(exchanging, "_POLL_S", 0.01)
    return FlowersGrid()


def some(number: int) -> list[Message]:
    return [Message(RecordDict(), i + 1, "train") for i in range(number)]


def ids(replies: list[Message]) -> list[tuple[str, bool]]:
    return [(reply.metadata.reply_to_message_id, reply.has_error()) for reply in replies]


def test_a_reply_that_is_not_whole_holds_up_no_other(grid: FlowersGrid) -> None:
    keys, puller = grid.push_messages(some(3)), Puller(grid)  # type: ignore[arg-type]
    slow = grid.announce(0, RecordDict())
    grid.announce(1, RecordDict()).set()
    assert ids(puller.pull(keys)) == [("message-1", False)]
    grid.announce(2, RecordDict()).set()
    assert ids(puller.pull(["message-0", "message-2"])) == [("message-2", False)]
    assert puller.pull(keys[:1]) == []  # the grid knows message 0 no more: asked again, it would be an error
    slow.set()
    found: list[Message] = []
    while not found:
        found = puller.pull(keys[:1])
    assert ids(found) == [("message-0", False)]


def test_many_messages_share_questions(grid: FlowersGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "_MOST_QUESTIONS", 3)
    keys, puller = grid.push_messages(some(8)), Puller(grid)  # type: ignore[arg-type]
    for i in range(8):
        grid.announce(i, RecordDict()).set()
    asked: list[list[str]] = []
    honest = grid.pull_messages

    def count(message_ids: Any) -> Iterator[Message]:
        asked.append(message_ids)
        return honest(message_ids)

    monkeypatch.setattr(grid, "pull_messages", count)
    assert ids(puller.pull(keys)) == [(key, False) for key in keys]
    assert asked == [keys[:3], keys[3:6], keys[6:]]


def test_an_error_is_a_reply_and_a_failed_question_raises(grid: FlowersGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, puller = grid.push_messages(some(1)), Puller(grid)  # type: ignore[arg-type]
    grid.announce(0, Error(5, "gone")).set()
    (reply,) = puller.pull(keys)
    assert (reply.error.code, reply.error.reason) == (5, "gone")

    def fails(message_ids: Any) -> Any:
        raise ConnectionError("no SuperLink")

    monkeypatch.setattr(grid, "pull_messages", fails)
    with pytest.raises(ConnectionError, match="no SuperLink"):
        puller.pull(["message-1"])


def test_who_dies_while_it_answers_costs_the_others_nothing(grid: FlowersGrid) -> None:
    messages = some(2)
    grid_messages = grid.push_messages

    def push(sent: Collection[Message]) -> list[str]:
        keys = grid_messages(sent)
        grid.announce(0, RecordDict())  # and never more
        grid.announce(1, RecordDict()).set()
        return keys

    grid.push_messages = push  # type: ignore[method-assign]
    replies = list(exchange(grid, messages, timeout=0.5))  # type: ignore[arg-type]
    assert [reply.has_error() for reply in replies] == [True, False]
