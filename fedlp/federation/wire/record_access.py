"""Typed access to Flower's records: record or value of the right kind under a key, or an error with the fault.

All raise KeyError or ValueError; decoders convert them into a ProtocolError that names the client.
"""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlp.errors import printable
from fedlp.federation.wire.packing import Signature, unpack_tensors
from fedlp.federation.wire.ranges import LARGEST_COST, read_number, show


def read_tensors(content: RecordDict, key: str, signature: Signature, coded: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a record, read-only; uncoded ones are views into the message."""
    return unpack_tensors(read_arrays(content, key), signature, coded)


def read_arrays(content: RecordDict, key: str) -> dict[str, bytes]:
    """Return the bytes of each array of a record."""
    arrays = content[key]
    if not isinstance(arrays, ArrayRecord):
        raise ValueError(f"record {key} holds no arrays")
    return {name: array.data for name, array in arrays.items()}


def read_config(content: RecordDict, key: str) -> ConfigRecord:
    """Return a record by its key; RecordDict's own views by type copy all records first."""
    record = content[key]
    if not isinstance(record, ConfigRecord):
        raise ValueError(f"record {key} is no config")
    return record


def read_metrics(content: RecordDict, key: str) -> MetricRecord:
    """Return a record of metrics."""
    record = content[key]
    if not isinstance(record, MetricRecord):
        raise ValueError(f"record {key} holds no metrics")
    return record


def read_integer(record: ConfigRecord, key: str) -> int:
    """Return an integer; booleans are refused."""
    value = record[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key} is {show(value)}, not an integer")
    return value


def read_limit(record: ConfigRecord, key: str) -> float:
    """Return a limit on a cost."""
    limit = read_number(record[key], 0.0, LARGEST_COST)
    if not limit:
        raise ValueError(f"{key} is {show(record[key])}, not a number above 0 and up to {LARGEST_COST:g}")
    return limit


def read_bytes(record: ConfigRecord, key: str) -> bytes:
    """Return bytes."""
    value = record[key]
    if not isinstance(value, bytes):
        raise ValueError(f"{key} is {type(value).__name__}, not bytes")
    return value


def say_why(error: BaseException) -> str:
    """Return one of these errors as one line; it may quote the input."""
    return printable(f"record or key {error} is missing" if isinstance(error, KeyError) else error)
