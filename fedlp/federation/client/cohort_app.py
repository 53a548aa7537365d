"""A Flower ClientApp that may also be given the training messages of several clients at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

Received = Sequence[tuple[Message, Context]]
Given = TypeVar("Given")
Found = TypeVar("Found")
AnswerAll = Callable[[Received], list[Message | Exception]]


class CohortApp(ClientApp):
    """ClientApp with a second door for training messages, which the local engine uses."""

    def __init__(self) -> None:
        super().__init__()
        self._answer_all: AnswerAll | None = None

    def cohort(self, answer_all: AnswerAll) -> AnswerAll:
        """Register how training messages of several clients are answered, each for itself."""
        self._answer_all = answer_all
        return answer_all

    def train_cohort(self, received: Received) -> list[Message | Exception]:
        """Return the reply to each message, or why there is none, in order."""
        assert self._answer_all is not None
        return self._answer_all(received)


def attempt(action: Callable[[Given], Found], given: Given) -> Found | Exception:
    """Return the result of an action, or its error: one client's error must not end the others' work."""
    try:
        return action(given)
    except Exception as error:
        return error
