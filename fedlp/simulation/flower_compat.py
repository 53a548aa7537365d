"""The one place that touches names Flower keeps private.

They moved in 2026 already: a test imports them, and ``pyproject.toml`` pins Flower to the minor version.
"""

from __future__ import annotations

from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "Run",
    "become_server",
    "is_simulated",
    "make_array",
    "make_instruction",
    "make_record",
    "make_run",
    "set_message_id",
]

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord, RecordDict)

SERVER_NODE = 1
RUN_ID = 1


def become_server() -> None:
    """Give this process the identity that messages are stamped with, outside of any SuperLink."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = RUN_ID
    TaskIdentity.node_id = SERVER_NODE


def is_simulated(grid: Grid) -> bool:
    """Return whether a ServerApp's grid is that of Flower's simulation runtime."""
    return type(grid).__module__.startswith("flwr.superlink.grid.inmemory")


def make_run() -> Run:
    """Return the description of a run that no SuperLink knows."""
    return Run.create_empty(RUN_ID)


def set_message_id(message: Message, message_id: str) -> None:
    """Stamp a message, as the SuperLink would."""
    message.metadata.__dict__["_message_id"] = message_id


def make_instruction(content: RecordDict, message_id: str, node_id: int, message_type: str, group_id: str) -> Message:
    """Return a message from the server as a node receives it."""
    metadata = Metadata(
        run_id=RUN_ID,
        message_id=message_id,
        src_node_id=SERVER_NODE,
        dst_node_id=node_id,
        reply_to_message_id="",
        group_id=group_id,
        created_at=0.0,
        ttl=float("inf"),
        message_type=message_type,
    )
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload, no-any-return]


def make_array(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    """Return an Array around a buffer without copying it; Flower's constructor takes bytes only."""
    array = Array.__new__(Array)
    array.__dict__.update(dtype=dtype, shape=shape, stype=stype, data=data)
    return array


def make_record(kind: type[Record], items: dict[str, Any]) -> Record:
    """Return a record of items that were in such a record before; Flower's constructors would check them all again."""
    record = kind()
    record.__dict__["_data"] = items
    return record
