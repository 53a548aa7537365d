"""Frames of messages for Ray: texts and bytes, and large arrays as one flat array of bytes in Ray's object store.

Ray keeps bytes and NumPy arrays as they are; nothing of fedlp's is pickled. Instructions of equal arrays share one
object, which Ray copies to a node once and which all actors of the node map.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlp.federation.wire.packing import Reserve
from fedlp.simulation.transport import aligned, split_buffers

_LENGTHS = struct.Struct("<II")

Image = NDArray[np.uint8]
"""Buffers one after another, each aligned."""


class LooseBuffers:
    """Buffers of one frame, which travel apart from it.

    Parameters
    ----------
    image : (n,) uint8, optional
        Received buffers.
    """

    def __init__(self, image: memoryview | None = None) -> None:
        self.written: tuple[Any, ...] = ()
        self._image = memoryview(b"") if image is None else image

    def write(self, buffers: Sequence[Any]) -> None:
        """Keep the buffers of a frame that is encoded."""
        self.written = tuple(buffers)

    def begin(self) -> Reserve:
        """Return an allocator without memory: buffers travel as they are."""
        return lambda size: None

    def read(self, lengths: Sequence[int]) -> list[memoryview]:
        """Return views of the received buffers."""
        return split_buffers(self._image, lengths)


def make_image(buffers: Sequence[Any]) -> Image:
    """Return the image of buffers, (n,) uint8."""
    image = np.zeros(sum(aligned(len(buffer)) for buffer in buffers), np.uint8)
    offset = 0
    for buffer in buffers:
        image[offset : offset + len(buffer)] = np.frombuffer(buffer, np.uint8)
        offset += aligned(len(buffer))
    return image


def encode_reply(frame: bytes, buffers: Sequence[Any], said: Sequence[str]) -> bytes:
    """Return one byte string of a frame, its loose buffers and the lines that the client's log has for the user."""
    text = json.dumps(list(said)).encode()
    image = make_image(buffers).data if buffers else b""
    return b"".join((_LENGTHS.pack(len(text), len(frame)), text, frame, image))


def decode_reply(reply: bytes) -> tuple[bytes, LooseBuffers, list[str]]:
    """Invert :func:`encode_reply`; the buffers are views."""
    text_size, frame_size = _LENGTHS.unpack_from(reply)
    start = _LENGTHS.size + text_size
    said = json.loads(reply[_LENGTHS.size : start])
    return reply[start : start + frame_size], LooseBuffers(memoryview(reply)[start + frame_size :]), said


class SharedImages:
    """Images in the object store, one for all messages with the very same buffers.

    Those that no message of an exchange has used are dropped at the end of the next one, so that a round's model serves
    evaluation and the next round alike.

    Parameters
    ----------
    put : callable
        Stores an image; returns a reference to it.
    most_bytes : int
        Bytes beyond which images are dropped that have not been used for longest.
    """

    def __init__(self, put: Callable[[Image], Any], most_bytes: int) -> None:
        self._put, self._most = put, most_bytes
        self._held: dict[tuple[int, ...], tuple[tuple[Any, ...], Any, int]] = {}  # least recently used first
        self._used: set[tuple[int, ...]] = set()

    def refer(self, buffers: tuple[Any, ...]) -> Any:
        """Return the reference to the image of some buffers."""
        key = tuple(id(buffer) for buffer in buffers)
        entry = self._held.pop(key, None)
        if entry is None:
            image = make_image(buffers)
            entry = buffers, self._put(image), image.nbytes
        self._held[key] = entry
        self._used.add(key)
        while len(self._held) > 1 and sum(size for *_, size in self._held.values()) > self._most:
            del self._held[next(iter(self._held))]
        return entry[1]

    def sweep(self) -> None:
        """End an exchange: drop what it has not used."""
        self._held = {key: entry for key, entry in self._held.items() if key in self._used}
        self._used.clear()
