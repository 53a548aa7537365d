"""Cache bounded by the bytes of its values."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class BoundedCache(Generic[_Value]):
    """Cache of a function's values; the least recently used ones are dropped first.

    Parameters
    ----------
    make : callable
        Returns the value of a key's parts; a raised error is not remembered.
    size_of : callable
        Returns the approximate bytes of a key and its value.
    most_bytes : int
        Largest total; the most recently used value is always kept.
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
        """Return the number of cached values."""
        return len(self._values)
