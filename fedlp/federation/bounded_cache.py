"""A cache that is bounded by the bytes of its values, not by their number."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class BoundedCache(Generic[_Value]):
    """Remembers the values of a function; the least recently used ones are dropped first.

    Parameters
    ----------
    make : callable
        Returns the value of a key's parts; a raised error is not remembered.
    size_of : callable
        Returns the bytes of a key and its value, about.
    most_bytes : int
        Bytes of all that is remembered, but for the value used last, which always is.
    """

    def __init__(self, make: Callable[..., _Value], size_of: Callable[[_Value], int], most_bytes: int) -> None:
        self._make, self._size_of, self._most_bytes = make, size_of, most_bytes
        self._values: OrderedDict[tuple[Hashable, ...], tuple[_Value, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def __call__(self, *key: Hashable) -> _Value:
        """Return the value of a key."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
            value = self._make(*key)
            self._values[key] = value, self._size_of(value)
            self.num_bytes += self._values[key][1]
            while self.num_bytes > self._most_bytes and len(self._values) > 1:
                self.num_bytes -= self._values.popitem(last=False)[1][1]
            return value

    def __len__(self) -> int:
        """Return how many values are remembered."""
        return len(self._values)
