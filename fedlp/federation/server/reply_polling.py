"""Polling of a grid for replies, without a wait for replies in transfer.

Flower hands out a reply when its sender announces it, and then waits for the content: three minutes where the sender
has died meanwhile, as long as it takes where its link is slow. All that was asked for in one question waits with it. So
every message is asked about by a question of its own, which may wait in a thread of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from flwr.app import Message
from flwr.serverapp import Grid

_PATIENCE_S = 2.0
_MOST_QUESTIONS = 16  # at a time; beyond that messages share them
_REST_S = 0.2  # for each, before the next ones: a question costs both sides tens of milliseconds


class Puller:
    """Puller of replies; an incomplete one does not delay others.

    Parameters
    ----------
    grid : Grid
        May be asked from several threads at once.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._open: list[_Question] = []
        self._rests_until = 0.0

    def pull(self, message_ids: Sequence[str]) -> list[Message]:
        """Return the replies since the last call, within seconds; open questions are not repeated.

        Parameters
        ----------
        message_ids : sequence of str
            All unanswered messages.
        """
        if time.monotonic() >= self._rests_until:
            self._ask(message_ids)
        answered = [question for question in self._open if not question.is_alive()]
        self._open = [question for question in self._open if question not in answered]
        return [reply for question in answered for reply in question.replies()]

    def _ask(self, message_ids: Sequence[str]) -> None:
        """Ask for all messages without an open question."""
        deadline = time.monotonic() + _PATIENCE_S
        held = {key for question in self._open for key in question.message_ids}
        free = [key for key in message_ids if key not in held]
        size = max(1, -(-len(free) // _MOST_QUESTIONS))
        starts = range(0, len(free), size)
        for start in starts:
            self._open.append(_Question(self._grid, free[start : start + size]))
            self._open[-1].join(max(0.0, deadline - time.monotonic()))
        self._rests_until = time.monotonic() + _REST_S * len(starts)


class _Question(threading.Thread):
    """Request for the replies to some messages, started at once."""

    def __init__(self, grid: Grid, message_ids: Sequence[str]) -> None:
        super().__init__(daemon=True)
        self.message_ids = message_ids
        self._grid = grid
        self._replies: list[Message] = []
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Wait for the answer."""
        try:
            self._replies = list(self._grid.pull_messages(self.message_ids))
        except BaseException as error:
            self._error = error

    def replies(self) -> list[Message]:
        """Return the answer, or raise its error."""
        if self._error is not None:
            raise self._error
        return self._replies
