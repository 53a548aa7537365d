"""Selector of pipes that the system's own selectors do not take."""

from __future__ import annotations

import selectors
from collections.abc import Callable, Mapping
from typing import Any


class PipeSelector(selectors.BaseSelector):
    """Selector around a function that waits.

    Parameters
    ----------
    wait : callable
        Returns, of several pipes, those that can be read; at the latest after a number of seconds, if one is given.
    """

    def __init__(self, wait: Callable[[Any, float | None], list[Any]]) -> None:
        self._wait = wait
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Add a pipe."""
        self._keys[fileobj] = key = selectors.SelectorKey(fileobj, len(self._keys), events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Remove a pipe."""
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return the pipes that can be read."""
        return [(self._keys[pipe], selectors.EVENT_READ) for pipe in self._wait(list(self._keys), timeout)]

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """Return the keys of all pipes."""
        return self._keys
