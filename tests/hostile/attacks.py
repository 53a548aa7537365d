"""Clients that attack: apps for the local engine in which some clients turn honest replies into harmful ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict

from fedlp.apps import runs as assembly
from fedlp.federation.oneshot import messages as pooling
from fedlp.federation.wire import messages
from tests.integration.running import App

HONEST = assembly.client_app
Attack = Callable[[Message, Message], Message]
"""The reply that an attacker sends, from the request and the honest reply."""

HEADER = 128  # bytes of an npy image before its values


def attacked(attack: Attack, clients: Collection[int], kind: str = messages.TRAIN) -> App:
    """Return the clients' app, in which some clients answer messages of one type with an attack."""

    def app(message: Message, context: Context) -> Message:
        reply = HONEST(message, context)
        if message.metadata.message_type == kind and context.node_config["partition-id"] in clients:
            return attack(message, reply)
        return reply

    return app


def absent(request: Message, reply: Message) -> Message:
    """Send nothing: what a run must be like whose attackers are all refused."""
    raise RuntimeError("absent")


def error(reason: str, code: int = 7) -> Attack:
    """Send an error reply."""
    return lambda request, _: Message(Error(code, reason), reply_to=request)


def values(dtype: str, change: Callable[[np.ndarray], None], record: str = messages.PARAMS) -> Attack:
    """Change the values of a dtype in place, in the order of the model."""

    def attack(_: Message, reply: Message) -> Message:
        arrays = reply.content[record]
        assert isinstance(arrays, ArrayRecord)
        array = arrays[dtype]
        data = bytearray(array.data)
        change(np.frombuffer(data, dtype=np.dtype(dtype), offset=HEADER))
        arrays[dtype] = Array(array.dtype, array.shape, array.stype, bytes(data))
        return reply

    return attack


def scale(factor: float) -> Attack:
    """Send the weights times a factor: -10 flips the signs."""

    def change(flat: np.ndarray) -> None:
        flat *= factor

    return values("float32", change)


def fill(dtype: str, value: float) -> Attack:
    """Send one value everywhere."""

    def change(flat: np.ndarray) -> None:
        flat[:] = value

    return values(dtype, change)


def set_entries(dtype: str, value: float, start: int, stop: int) -> Attack:
    """Send one value in some entries."""

    def change(flat: np.ndarray) -> None:
        flat[start:stop] = value

    return values(dtype, change)


def shortened(_: Message, reply: Message) -> Message:
    """Send an array without its last value."""
    arrays = reply.content[messages.PARAMS]
    assert isinstance(arrays, ArrayRecord)
    arrays["float32"] = Array(arrays["float32"].numpy()[:-1])
    return reply


def metric(key: str, value: float) -> Attack:
    """Send a metric."""

    def attack(_: Message, reply: Message) -> Message:
        reply.content.metric_records[messages.METRICS][key] = value
        return reply

    return attack


def config(record: str, key: str, value: bytes | int | float) -> Attack:
    """Send a value in a config record."""

    def attack(_: Message, reply: Message) -> Message:
        reply.content.config_records[record][key] = value
        return reply

    return attack


def moments(factor: float) -> Attack:
    """Send second moments times a factor and the honest sum of the inputs: consistent for any factor above 1.

    Of a layer with one reader: its sum, (n,), and the lower triangle of its second moments.
    """

    def attack(_: Message, reply: Message) -> Message:
        arrays = reply.content.array_records[pooling.PARAMS]
        flat = arrays["float64"].numpy().copy()
        size = (math.isqrt(9 + 8 * len(flat)) - 3) // 2
        assert size + size * (size + 1) // 2 == len(flat)
        flat[size:] *= factor
        arrays["float64"] = Array(flat)
        return reply

    return attack


def nothing(request: Message, _: Message) -> Message:
    """Send an empty reply."""
    return Message(RecordDict({"x": ConfigRecord()}), reply_to=request)


def line_length(rounds: list[dict[str, object]]) -> int:
    """Return the length of the longest line of ``rounds.jsonl``."""
    return max(len(json.dumps(line)) for line in rounds)
