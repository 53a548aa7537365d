"""Transport of messages to worker processes: a JSON frame through a pipe, arrays through shared memory.

No message is pickled. A frame holds one or several: ``length of the JSON, JSON, small arrays``; large arrays lie in
the slot's area, where the receiver reads them without a copy. An area that already holds the very same arrays (a
model that goes to many clients) is not written again.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlp.errors import FedLPError
from fedlp.federation.flower_compat import make_array, make_record
from fedlp.federation.wire.packing import Reserve

INLINE_BYTES = 8192  # arrays up to this many bytes in all travel in the frame
_ALIGNMENT = 64
_LENGTH = struct.Struct("<I")

WrapBuffer = Callable[[str, tuple[int, ...], str, Any], Array]


class Memory(Protocol):
    """Place of the large arrays of a frame."""

    def write(self, buffers: Sequence[Any]) -> None:
        """Take the buffers of a frame that is encoded."""

    def read(self, lengths: Sequence[int]) -> list[memoryview]:
        """Return the buffers of a frame that is decoded."""

    def begin(self) -> Reserve:
        """Return the allocator of buffers of the next encoded frame."""


class Area:
    """Shared memory of one slot in one direction.

    Parameters
    ----------
    memory : memoryview
        Bytes that both processes see; pages are only used once they are written.
    """

    def __init__(self, memory: memoryview) -> None:
        self._view = memory
        self._holds: tuple[Any, ...] = ()
        self._reserved: list[tuple[memoryview, int]] = []  # with their offsets
        self._end = 0  # of what is reserved

    def begin(self) -> Reserve:
        """Return the allocator of buffers of the next frame; buffers in their places are not written again."""
        self._reserved, self._end = [], 0
        return self._reserve

    def _reserve(self, size: int) -> memoryview | None:
        self._holds, start = (), self._end
        if start + aligned(size) > len(self._view):
            return None
        view = self._view[start : start + size]
        self._reserved.append((view, start))
        self._end += aligned(size)
        return view

    def write(self, buffers: Sequence[Any]) -> None:
        """Write the buffers one after another, except a leading part that the area holds already."""
        lengths = [len(buffer) for buffer in buffers]
        end = sum(map(aligned, lengths))
        if end > len(self._view):
            raise FedLPError(f"a message of {end} bytes is larger than the engine's slots of {len(self._view)} bytes")
        offset, fresh = 0, False
        if self._reserved:
            buffers = self._settle(buffers)
        for i, buffer in enumerate(buffers):
            # Behind the first buffer that differs, offsets may have moved: write all of the rest.
            fresh = fresh or i >= len(self._holds) or buffer is not self._holds[i]
            if fresh and buffer is not None:
                self._view[offset : offset + len(buffer)] = buffer
            offset += aligned(lengths[i])
        self._holds = tuple(buffers)

    def _settle(self, buffers: Sequence[Any]) -> list[Any]:
        """Return the buffers still to be written: None for one in its place, a copy of one in reserved memory."""
        places = {(_address(view), len(view)): start for view, start in self._reserved}
        self._reserved, self._end = [], 0
        offset, found = 0, list[Any]()
        for buffer in buffers:
            start = places.get((_address(buffer), len(buffer)))
            found.append(None if start == offset else buffer if start is None else bytes(buffer))
            offset += aligned(len(buffer))
        return found

    def read(self, lengths: Sequence[int]) -> list[memoryview]:
        """Return views of buffers of the given lengths."""
        return split_buffers(self._view, lengths)


def _address(buffer: Any) -> int:
    return np.frombuffer(buffer, np.uint8).ctypes.data if len(buffer) else 0


def split_buffers(image: memoryview, lengths: Sequence[int]) -> list[memoryview]:
    """Return views of buffers that lie one after another, each aligned."""
    views, offset = [], 0
    for length in lengths:
        views.append(image[offset : offset + length])
        offset += aligned(length)
    return views


Item = tuple[dict[str, Any], RecordDict | None]
"""Content of one message: JSON values (message id, node id, ...), and its records."""


def encode_frame(items: Sequence[Item], area: Memory) -> bytes:
    """Return the frame of one or several messages; their large arrays are written into the area.

    An array that several messages share is written once.
    """
    buffers = _Buffers()
    head: dict[str, Any] = {
        "items": [
            (about, None if content is None else {k: _encode_record(record, buffers) for k, record in content.items()})
            for about, content in items
        ]
    }
    lengths = [len(buffer) for buffer in buffers.found]
    inline = sum(lengths) <= INLINE_BYTES
    text = json.dumps(head | {"lengths": lengths, "inline": inline}).encode()
    if not inline:
        area.write(buffers.found)
        return b"".join((_LENGTH.pack(len(text)), text))
    return b"".join((_LENGTH.pack(len(text)), text, *buffers.found))


def decode_frame(frame: bytes, area: Memory, wrap: WrapBuffer) -> list[Item]:
    """Invert :func:`encode_frame`; ``wrap`` makes arrays of views, valid until the slot is reused."""
    (size,) = _LENGTH.unpack_from(frame)
    head = json.loads(frame[_LENGTH.size : _LENGTH.size + size])
    if head["inline"]:
        views, offset, whole = [], _LENGTH.size + size, memoryview(frame)
        for length in head["lengths"]:
            views.append(whole[offset : offset + length])
            offset += length
    else:
        views = area.read(head["lengths"])
    return [
        (about, None if records is None else _decode_records(records, views, wrap)) for about, records in head["items"]
    ]


def _decode_records(records: dict[str, Any] | None, views: Sequence[memoryview], wrap: WrapBuffer) -> RecordDict | None:
    if records is None:
        return None
    found = {key: _decode_record(kind, items, views, wrap) for key, (kind, items) in records.items()}
    return make_record(RecordDict, found)


class _Buffers:
    """Buffers of a frame, each once."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self._places: dict[int, int] = {}

    def add(self, buffer: Any) -> int:
        """Return the place of a buffer."""
        place = self._places.setdefault(id(buffer), len(self.found))
        if place == len(self.found):
            self.found.append(buffer)
        return place


def copy_array(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    """Return an Array that owns its bytes."""
    return make_array(dtype, shape, stype, bytes(data))


def aligned(length: int) -> int:
    """Return a length rounded up to where the next buffer may begin."""
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _encode_record(record: object, buffers: _Buffers) -> tuple[str, dict[str, Any]]:
    if isinstance(record, ArrayRecord):
        items = {}
        for key, array in record.items():
            items[key] = (array.dtype, array.shape, array.stype, buffers.add(array.data))
        return "arrays", items
    if isinstance(record, MetricRecord):
        return "metrics", dict(record)
    assert isinstance(record, ConfigRecord)
    return "config", {key: _encode_value(value, buffers) for key, value in record.items()}


def _decode_record(
    kind: str, items: dict[str, Any], views: Sequence[memoryview], wrap: WrapBuffer
) -> ArrayRecord | MetricRecord | ConfigRecord:
    if kind == "arrays":
        arrays = {key: wrap(dtype, tuple(shape), stype, views[i]) for key, (dtype, shape, stype, i) in items.items()}
        return make_record(ArrayRecord, arrays)
    if kind == "metrics":
        return make_record(MetricRecord, items)
    return make_record(ConfigRecord, {key: _decode_value(value, views) for key, value in items.items()})


def _encode_value(value: Any, buffers: _Buffers) -> Any:
    """Return a config value as JSON; bytes become a reference to a buffer."""
    if isinstance(value, bytes):
        return {"buffer": buffers.add(value)}
    return [_encode_value(item, buffers) for item in value] if isinstance(value, list) else value


def _decode_value(value: Any, views: Sequence[memoryview]) -> Any:
    if isinstance(value, dict):
        return bytes(views[value["buffer"]])
    return [_decode_value(item, views) for item in value] if isinstance(value, list) else value
