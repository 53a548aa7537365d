"""Index sets as bytes: uploaded tensors, and held units of each axis.

Both sides know the names and the sizes, so only positions are sent: as bitmaps (bit i of byte i // 8, least significant
first), or as runs where that is shorter.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from fedlp.types import Keep

_AXIS = struct.Struct("<HBI")  # axis number, kind (0 runs, 1 bitmap), payload length


@lru_cache(maxsize=1024)
def encode_names(chosen: frozenset[str], all_names: tuple[str, ...]) -> bytes:
    """Return a bitmap over ``all_names``: bit i of byte i // 8 (least significant first) is name i."""
    bits = np.fromiter((name in chosen for name in all_names), dtype=bool, count=len(all_names))
    return np.packbits(bits, bitorder="little").tobytes()


@lru_cache(maxsize=1024)
def decode_names(data: bytes, all_names: tuple[str, ...]) -> frozenset[str]:
    """Invert :func:`encode_names`; ValueError if the bitmap has another length."""
    bits = _unpack_bits(data, len(all_names), "uploads")
    return frozenset(all_names[int(i)] for i in np.flatnonzero(bits))


def encode_counts(kept: Mapping[str, int], axes: Sequence[str]) -> bytes:
    """Return the number of kept units of each axis; 0 for absent axes."""
    return np.array([kept.get(axis, 0) for axis in axes], dtype="<u4").tobytes()


def decode_counts(data: bytes, axes: Sequence[str]) -> dict[str, int]:
    """Invert :func:`encode_counts`; ValueError unless there is one count per axis."""
    counts = np.frombuffer(data, dtype="<u4")
    if len(counts) != len(axes):
        raise ValueError(f"there are {len(counts)} unit counts for {len(axes)} axes")
    return {axis: int(count) for axis, count in zip(axes, counts, strict=True) if count}


def encode_widths(widths: Mapping[str, Keep], axes: Sequence[str]) -> bytes:
    """Return the kept indices of each named axis: as (start, stop) pairs or as a bitmap, whichever is shorter."""
    number = {axis: i for i, axis in enumerate(axes)}
    parts = []
    for axis, keep in sorted(widths.items(), key=lambda item: number[item[0]]):
        runs = np.asarray(keep.runs, dtype="<u4").tobytes()
        bitmap_length = (keep.size + 7) // 8
        if len(runs) <= bitmap_length:
            kind, payload = 0, runs
        else:
            bits = np.zeros(keep.size, dtype=bool)
            bits[keep.indices()] = True
            kind, payload = 1, np.packbits(bits, bitorder="little").tobytes()
        parts.append(_AXIS.pack(number[axis], kind, len(payload)) + payload)
    return b"".join(parts)


def decode_widths(data: bytes, axes: Mapping[str, int]) -> dict[str, Keep]:
    """Invert :func:`encode_widths` for axes of the given sizes.

    Raises
    ------
    ValueError
        If an axis or index is out of range, axes are out of order, or bytes exceed their bitmaps.
    """
    sizes = list(axes.items())
    most = sum(_AXIS.size + (size + 7) // 8 for size in axes.values())
    if len(data) > most:
        raise ValueError(f"the width plan has {len(data)} bytes; {most} hold any")
    widths: dict[str, Keep] = {}
    offset, last = 0, -1
    while offset < len(data):
        if len(data) < offset + _AXIS.size:
            raise ValueError("the width plan ends in the middle of an axis")
        number, kind, length = _AXIS.unpack_from(data, offset)
        offset += _AXIS.size
        payload = data[offset : offset + length]
        offset += length
        if not last < number < len(sizes) or len(payload) != length or kind not in (0, 1):
            raise ValueError(f"axis {number} of the width plan is malformed")
        name, size = sizes[number]
        last = number
        if kind == 0:
            runs = np.frombuffer(payload, dtype="<u4").reshape(-1, 2)
            widths[name] = Keep(size, tuple((int(start), int(stop)) for start, stop in runs))
        else:
            widths[name] = Keep.from_indices(np.flatnonzero(_unpack_bits(payload, size, f"axis {name}")), size)
    return widths


def _unpack_bits(data: bytes, count: int, what: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    if len(data) != (count + 7) // 8:
        raise ValueError(f"the bitmap of {what} has {len(data)} bytes, not {(count + 7) // 8}")
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count, bitorder="little")
