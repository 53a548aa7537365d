"""Messages of several clients at once, within one machine: an instruction that they share, the stack of their updates.

Where clients get the same sub-model and return the same tensors, their messages are equal in form. Then one message
holds the ids of all of them, and one reply the image of every client's update, row by row: each is, byte for byte, what
the client would send by itself, and is counted and checked as such.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedlp.errors import ProtocolError
from fedlp.federation.flower_compat import make_array, make_record
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.downloads import Download
from fedlp.federation.wire.index_sets import encode_names
from fedlp.federation.wire.messages import INSTRUCTION, METRICS, PARAMS, UPDATE, decode_instruction
from fedlp.federation.wire.packing import Signature, pack_stacks, unpack_stacks
from fedlp.federation.wire.record_access import (
    read_arrays,
    read_config,
    read_integer,
    read_metrics,
    say_why,
)
from fedlp.types import Assignment, TrainInstruction

TRAIN_COHORT = "train.cohort"
_IDS, _EXAMPLES, _LOSSES = "client-ids", "num-examples", "train-losses"


@dataclass(frozen=True, slots=True)
class StackedUpdate:
    """Updates of several clients, equal in form.

    Attributes
    ----------
    num_examples : sequence of int
    losses : sequence of float
        Mean training loss of each client, NaN or infinite where it has none.
    params : mapping from tensor name to (clients, ...)
        In the order of the model.
    images : mapping from dtype name to (clients, bytes)
        The arrays of each client's message; empty before they are encoded.
    """

    server_round: int
    client_ids: Sequence[int]
    num_examples: Sequence[int]
    losses: Sequence[float]
    params: Mapping[str, Tensor]
    images: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)


def stack_instructions(content: RecordDict, client_ids: Sequence[int]) -> RecordDict:
    """Return the message for several clients, given that for the first of them."""
    record = {**content[INSTRUCTION], _IDS: list(client_ids)}
    return make_record(RecordDict, {**content, INSTRUCTION: make_record(ConfigRecord, record)})


def count_clients(content: RecordDict) -> int:
    """Return the number of clients that a message is for."""
    record = content.get(INSTRUCTION)
    return len(record.get(_IDS, "1")) if isinstance(record, ConfigRecord) else 1  # type: ignore[arg-type]


def decode_instructions(
    content: RecordDict, submodels: SubModels, download: Download | None = None
) -> tuple[TrainInstruction, list[int]]:
    """Return the instruction of the first client, and the ids of all; ``download`` as of ``decode_instruction``.

    Raises
    ------
    ProtocolError
        Where a record is missing or malformed.
    """
    instruction = decode_instruction(content, submodels, download=download)
    found = read_config(content, INSTRUCTION).get(_IDS)
    if not isinstance(found, list) or not found or not all(type(item) is int for item in found):
        raise ProtocolError("the server's instruction to several clients cannot be read: it has no list of client ids")
    client_ids = [int(item) for item in found]
    if client_ids[0] != instruction.client_id or len(set(client_ids)) < len(client_ids):
        raise ProtocolError("the server's instruction to several clients names one twice, or another first")
    return instruction, client_ids


def encode_updates(update: StackedUpdate, submodels: SubModels) -> RecordDict:
    """Return the records of several clients' updates; all tensors are encoded by one operation each."""
    uploads = encode_names(submodels.name_set.intersection(update.params), submodels.names)
    ids = list(update.client_ids)
    record = {"server-round": update.server_round, "client-id": ids[0], "uploads": uploads, _IDS: ids}
    metrics = {_EXAMPLES: list(update.num_examples), _LOSSES: list(update.losses)}
    return make_record(
        RecordDict,
        {
            PARAMS: _as_arrays(pack_stacks(update.params)),
            UPDATE: make_record(ConfigRecord, record),
            METRICS: make_record(MetricRecord, metrics),
        },
    )


def _as_arrays(images: Mapping[str, NDArray[np.uint8]]) -> ArrayRecord:
    """Return one array per dtype; its bytes are images, one after another."""
    data = {name: rows.reshape(-1).data for name, rows in images.items()}
    return make_record(ArrayRecord, {name: make_array(name, (len(x),), "numpy.ndarray", x) for name, x in data.items()})


def decode_updates(content: RecordDict, assigned: Sequence[Assignment], signature: Signature) -> StackedUpdate:
    """Return the updates of several clients, whose form is checked; their values are not.

    Parameters
    ----------
    signature : Signature
        Tensors that each client was asked for.

    Raises
    ------
    ProtocolError
        Another round, other clients, a missing or misshapen array, or not one number per client.
    """
    first = assigned[0]
    who = f"clients {first.client_id} to {assigned[-1].client_id}, round {first.server_round}"
    try:
        record, metrics = read_config(content, UPDATE), read_metrics(content, METRICS)
        ids = [one.client_id for one in assigned]
        if read_integer(record, "server-round") != first.server_round or record[_IDS] != ids:
            raise ValueError("the updates are of another round, or of other clients")
        images = {name: _rows(name, data, len(ids)) for name, data in read_arrays(content, PARAMS).items()}
        return StackedUpdate(
            server_round=first.server_round,
            client_ids=ids,
            num_examples=_read_list(metrics, _EXAMPLES, int, len(ids)),
            losses=_read_list(metrics, _LOSSES, float, len(ids)),
            params=unpack_stacks(images, signature),
            images=images,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ProtocolError(f"{who}: the updates cannot be read: {say_why(error)}") from error


def _rows(name: str, data: memoryview | bytes, count: int) -> NDArray[np.uint8]:
    if len(data) % count:
        raise ValueError(f"array {name} has {len(data)} bytes, which are no {count} rows")
    return np.frombuffer(data, dtype=np.uint8).reshape(count, -1)


def _read_list(record: MetricRecord, key: str, kind: type, count: int) -> list[Any]:
    found = record[key]
    if not isinstance(found, list) or len(found) != count or not all(type(item) is kind for item in found):
        raise ValueError(f"{key} is no list of {count} numbers")
    return found


def client_message(update: StackedUpdate, k: int, uploads: bytes) -> RecordDict:
    """Return the records that client ``k`` of a stack would have sent by itself.

    Parameters
    ----------
    uploads : bytes
        Encoded names of the tensors.
    """
    loss = update.losses[k]
    metrics = {"num-examples": update.num_examples[k], **({"train-loss": loss} if math.isfinite(loss) else {})}
    record = {"server-round": update.server_round, "client-id": update.client_ids[k], "uploads": uploads}
    return make_record(
        RecordDict,
        {
            PARAMS: _as_arrays({name: rows[k] for name, rows in update.images.items()}),
            UPDATE: make_record(ConfigRecord, record),
            METRICS: make_record(MetricRecord, metrics),
        },
    )
