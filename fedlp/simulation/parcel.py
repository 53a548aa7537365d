"""Parcels: what makes a ClientApp again in a spawned worker, handed over once for all workers in shared memory.

A parcel is a JSON header and raw arrays; functions and classes go by name. Its block is readable to the same user
alone. The header's digest comes through the parent's private pipe, and every field is checked where it is read::

    {"maker": "module:name", "about": {...} or null, "arrays": {name: [dtype, shape, offset]}}
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fedlp.errors import ConfigError, FedLPError
from fedlp.simulation.named import find_named, name_of
from fedlp.simulation.shared_blocks import Block, check_room
from fedlp.simulation.transport import aligned

Label = tuple[str, int, str]
"""Name of a parcel's block, bytes of its header, and the header's SHA-256 in hexadecimal."""

_DTYPE = re.compile(r"[<|](b1|[iu][1248]|f[248])")


@dataclass(frozen=True)
class HandOver:
    """Recipe of a ClientApp for another process.

    Attributes
    ----------
    maker : str
        Name ``module:qualname`` of a function that returns the app from ``about`` and ``arrays``.
    about : mapping of JSON values or None
        With None the maker takes no arguments.
    arrays : mapping from name to array
        Booleans, integers or floats of any shape; they are mapped by workers, not copied.
    """

    maker: str
    about: Mapping[str, Any] | None = None
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def hand_over_of(load_app: Callable[[], ClientApp]) -> HandOver:
    """Return the recipe of an app: the maker's own ``hand_over()`` if it has one, else a function's name.

    Raises
    ------
    ConfigError
        If another process cannot import it by name.
    """
    hand_over: Callable[[], HandOver] | None = getattr(load_app, "hand_over", None)
    if hand_over is not None:
        return hand_over()
    if (name := name_of(load_app)) is None:
        raise ConfigError(
            f"spawned workers cannot import {getattr(load_app, '__qualname__', load_app)} by name; define it at the "
            "top level of a module or script"
        )
    return HandOver(name)


class Parcel:
    """A hand-over in shared memory.

    Raises
    ------
    FedLPError
        If there is no room, or an array or a value has no such form.
    """

    def __init__(self, content: HandOver) -> None:
        places, end = {}, 0
        for name, array in content.arrays.items():
            dtype = array.dtype.newbyteorder("<").str
            if not _DTYPE.fullmatch(dtype):
                raise FedLPError(f"spawned workers cannot be given the array {name} of dtype {array.dtype}")
            places[name] = (dtype, array.shape, end)
            end += aligned(array.nbytes)
        header = json.dumps({"maker": content.maker, "about": content.about, "arrays": places}, default=_plain).encode()
        start = aligned(len(header))
        check_room(start + end)
        self._block = Block(create=True, size=start + end)
        memory = self._block.memory
        memory[: len(header)] = header
        for name, (dtype, shape, offset) in places.items():
            np.ndarray(shape, dtype, memory, start + offset)[...] = content.arrays[name]
        self.label: Label = self._block.name, len(header), hashlib.sha256(header).hexdigest()

    def remove(self) -> None:
        """Remove the parcel; those who have opened it keep its arrays."""
        self._block.remove()
        self._block.leave()


def open_parcel(label: Label) -> HandOver:
    """Return the content of a parcel that the parent has made; its arrays are views.

    Raises
    ------
    FedLPError
        If its block holds another header, or a field of the header is wrong.
    """
    name, size, digest = label
    memory = Block(name=name).memory
    image = bytes(memory[:size])  # nobody can change it between check and use
    if hashlib.sha256(image).hexdigest() != digest:
        raise FedLPError("the shared memory of this run was changed by another process; start the run again")
    return read_header(image, memory[aligned(size) :])


def read_header(image: bytes, memory: memoryview) -> HandOver:
    """Return the content of a header (JSON) whose arrays lie in ``memory``; FedLPError if a field is wrong."""
    try:
        header = json.loads(image)
    except (ValueError, RecursionError) as error:
        raise _wrong("the header is no JSON") from error
    if not isinstance(header, dict) or header.keys() != {"maker", "about", "arrays"}:
        raise _wrong("the header has other fields than maker, about and arrays")
    maker, about, places = header["maker"], header["about"], header["arrays"]
    if not isinstance(maker, str) or not isinstance(about, dict | None) or not isinstance(places, dict):
        raise _wrong("maker, about or arrays is of another type")
    return HandOver(maker, about, {name: _view(name, place, memory) for name, place in places.items()})


def make_app(content: HandOver) -> ClientApp:
    """Return the app of a hand-over.

    Raises
    ------
    FedLPError
        If its maker, or what it is given, cannot be found or is wrong.
    """
    make = find_named(content.maker)
    app: ClientApp = make() if content.about is None else make(content.about, content.arrays)
    return app


def _view(name: str, place: Any, memory: memoryview) -> NDArray[Any]:
    """Return a view of one array."""
    if not isinstance(place, list) or len(place) != 3:
        raise _wrong(f"array {name} is not given as dtype, shape and offset")
    dtype, shape, offset = place
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise _wrong(f"array {name} has the dtype {str(dtype)[:20]!r}")
    numbers = [*shape, offset] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _wrong(f"array {name} has a shape or offset that is no whole number >= 0")
    if offset % aligned(1) or offset + math.prod(shape) * np.dtype(dtype).itemsize > len(memory):
        raise _wrong(f"array {name} does not lie in the block")
    return np.ndarray(tuple(shape), dtype, memory, offset)


def _wrong(what: str) -> FedLPError:
    return FedLPError(f"what this worker was handed cannot be read: {what}; start the run again")


def _plain(value: Any) -> Any:
    """Return NumPy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise FedLPError(f"spawned workers cannot be given a {type(value).__name__}")
