"""Mutations of replies: what a client may send that no honest one does, from a seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Mutation = Callable[[np.random.Generator, RecordDict], None]

INTEGERS = (0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 5e-324, 1e-45, 3e38, -3e38, 1.7e308, 1e15, 1e16, np.inf, -np.inf, np.nan)
TEXTS = ("", " ", "\n", "\x1b[2J\x1b]0;title\x07", "\u202eevil", "é" * 300, "\ud800", "params", "client 0, round 1: ")
BLOBS = (b"", b"\x00", b"\xff" * 9, b"\x93NUMPY", bytes(64))
BIG = 10**7
HEADER = 128  # bytes of an npy image before its values


def mutate(rng: np.random.Generator, honest: RecordDict) -> RecordDict:
    """Return a copy of a reply after one to three mutations."""
    content = copy.deepcopy(honest)
    for _ in range(int(rng.integers(1, 4))):
        weights = np.array([weight for _, weight in MUTATIONS], dtype=np.float64)
        mutation, _ = MUTATIONS[int(rng.choice(len(MUTATIONS), p=weights / weights.sum()))]
        mutation(rng, content)
    return content


def pick(rng: np.random.Generator, items: Any) -> Any:
    items = list(items)
    return items[int(rng.integers(len(items)))] if items else None


# ---- records
def drop_record(rng: np.random.Generator, content: RecordDict) -> None:
    if (key := pick(rng, content)) is not None:
        del content[key]


def drop_key(rng: np.random.Generator, content: RecordDict) -> None:
    record = content.get(pick(rng, content) or "")
    if record:
        del record[pick(rng, record)]


def rename_key(rng: np.random.Generator, content: RecordDict) -> None:
    record = content.get(pick(rng, content) or "")
    if record:
        key = pick(rng, record)
        record[pick(rng, (*TEXTS[:-3], "x" * 100_000, "num-examples", "uploads", "float32"))] = record.pop(key)


def swap_records(rng: np.random.Generator, content: RecordDict) -> None:
    one, other = pick(rng, content), pick(rng, content)
    if one is not None:
        records = content.pop(one), content.pop(other, None)
        content[other] = records[0]
        if records[1] is not None:
            content[one] = records[1]


def replace_record(rng: np.random.Generator, content: RecordDict) -> None:
    key = pick(rng, [*content, "extra"])
    content.pop(key, None)  # else Flower warns
    content[key] = pick(rng, [ArrayRecord(), MetricRecord(), ConfigRecord(), MetricRecord({"a": 1.0})])


def crowd(rng: np.random.Generator, content: RecordDict) -> None:
    record = content.get(pick(rng, content) or "")
    if isinstance(record, MetricRecord | ConfigRecord):
        for number in range(int(rng.integers(1, 200))):
            record[f"k{number}"] = 1.0


# ---- values
def any_value(rng: np.random.Generator, in_metrics: bool) -> Any:
    number: Any = pick(rng, INTEGERS) if rng.random() < 0.5 else float(pick(rng, FLOATS))
    if rng.random() < 0.15:
        return [number] * int(pick(rng, (1, 3, 1000)))
    if in_metrics or rng.random() < 0.5:
        return number
    kind = rng.random()
    if kind < 0.3:
        return bool(rng.integers(2))
    if kind < 0.5:
        return pick(rng, [text for text in TEXTS if text != "\ud800"])
    if kind < 0.55:
        return [b""] if rng.random() < 0.5 else ["x", "\x1b"]
    return pick(rng, BLOBS) if rng.random() < 0.7 else rng.bytes(int(rng.integers(200)))


def set_value(rng: np.random.Generator, content: RecordDict) -> None:
    records = [record for record in content.values() if isinstance(record, MetricRecord | ConfigRecord) and record]
    if records:
        record = pick(rng, records)
        record[pick(rng, record)] = any_value(rng, isinstance(record, MetricRecord))


def garble_bytes(rng: np.random.Generator, content: RecordDict) -> None:
    """Change, cut, repeat or lengthen bytes in a config record: bitmaps, width plans, counts."""
    found = [
        (record, key)
        for record in content.values()
        if isinstance(record, ConfigRecord)
        for key, value in record.items()
        if isinstance(value, bytes)
    ]
    if found:
        record, key = pick(rng, found)
        record[key] = spoil(rng, record[key])


def spoil(rng: np.random.Generator, data: bytes) -> bytes:
    kind = rng.random()
    at = int(rng.integers(len(data) + 1))
    if kind < 0.5 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
    if kind < 0.7:
        return data[:at]
    if kind < 0.8:
        return data[:at] + rng.bytes(int(rng.integers(1, 20))) + data[at:]
    if kind < 0.9:
        return data + data
    return rng.bytes(len(data)) if kind < 0.99 else data + bytes(BIG)


# ---- arrays
def some_array(rng: np.random.Generator, content: RecordDict) -> tuple[ArrayRecord, str] | None:
    records = [record for record in content.values() if isinstance(record, ArrayRecord) and record]
    record = pick(rng, records)
    return None if record is None else (record, pick(rng, record))


def spoil_array(rng: np.random.Generator, content: RecordDict) -> None:
    if (found := some_array(rng, content)) is not None:
        record, key = found
        array = record[key]
        record[key] = Array(array.dtype, array.shape, array.stype, spoil(rng, bytes(array.data)))


def poison_array(rng: np.random.Generator, content: RecordDict) -> None:
    """Write values that are well-formed, and may be harmful, over one entry, a part or all of an array."""
    if (found := some_array(rng, content)) is None:
        return
    record, key = found
    array = record[key]
    if key not in DTYPES or len(array.data) < HEADER + 8:
        return
    data, dtype = bytearray(array.data), np.dtype(DTYPES[key])
    count = (len(data) - HEADER) // dtype.itemsize
    values = np.frombuffer(data, dtype=dtype, offset=HEADER, count=count)
    where = pick(rng, (slice(0, 1), slice(count // 2, count // 2 + 1), slice(count - 1, count), slice(0, count)))
    with np.errstate(all="ignore"):
        kind = rng.random()
        if values.dtype.kind == "f" and kind < 0.5:
            values[where] = pick(rng, FLOATS)
        elif values.dtype.kind == "f":
            values[where] *= float(pick(rng, (-1.0, -10.0, 1e3, 1e6, 1e12, 1e30)))
        else:
            values[where] = np.array(pick(rng, INTEGERS)).astype(values.dtype)
    record[key] = Array(array.dtype, array.shape, array.stype, bytes(data))


DTYPES = {"float32": "<f4", "float64": "<f8", "int64": "<i8", "int8": "|i1", "uint8": "|u1", "bfloat16": "<i2"}


def other_array(rng: np.random.Generator, content: RecordDict) -> None:
    if (found := some_array(rng, content)) is not None:
        record, key = found
        shape = pick(rng, ((), (0,), (3,), (2, 2), (100_000,)))
        record[key] = Array(np.zeros(shape, dtype=pick(rng, ("float32", "float64", "int64", "uint8", "float16"))))


MUTATIONS: list[tuple[Mutation, float]] = [
    (drop_record, 1),
    (drop_key, 1),
    (rename_key, 1),
    (swap_records, 1),
    (replace_record, 1),
    (crowd, 1),
    (set_value, 8),
    (garble_bytes, 5),
    (spoil_array, 4),
    (poison_array, 6),
    (other_array, 1),
]
