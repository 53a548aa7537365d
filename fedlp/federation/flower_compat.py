"""The one place that touches names Flower keeps private.

They moved in 2026 already: a test imports them, and ``pyproject.toml`` pins Flower to the minor version.
"""

from __future__ import annotations

import time
from functools import cache
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
    "make_reply",
    "make_request",
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
    about = {
        "_run_id": RUN_ID,
        "_message_id": message_id,
        "_src_node_id": SERVER_NODE,
        "_dst_node_id": node_id,
        "_src_task_id": None,
        "_dst_task_id": None,
        "_reply_to_message_id": "",
        "_group_id": group_id,
        "_created_at": 0.0,
        "_ttl": float("inf"),
        "_message_type": message_type,
    }
    return _make_message(content, about)


def make_request(content: RecordDict, node_id: int, message_type: str, group_id: str, ttl: float) -> Message:
    """Return ``Message(content, node_id, message_type, group_id=group_id, ttl=ttl)``, without checks of arguments."""
    about = {
        "_run_id": TaskIdentity.run_id,
        "_message_id": "",
        "_src_node_id": TaskIdentity.node_id,
        "_dst_node_id": node_id,
        "_src_task_id": TaskIdentity.task_id,
        "_dst_task_id": None,
        "_reply_to_message_id": "",
        "_group_id": group_id,
        "_created_at": time.time(),
        "_ttl": ttl,
        "_message_type": message_type,
    }
    return _make_message(content, about)


def make_reply(content: RecordDict, message: Message) -> Message:
    """Return ``Message(content, reply_to=message)``, without the checks of its arguments."""
    asked = message.metadata.__dict__
    sent = time.time()
    about = {
        **asked,
        "_message_id": "",
        "_src_node_id": asked["_dst_node_id"],
        "_dst_node_id": asked["_src_node_id"],
        "_src_task_id": asked["_dst_task_id"],
        "_dst_task_id": asked["_src_task_id"],
        "_reply_to_message_id": asked["_message_id"],
        "_created_at": sent,
        "_ttl": asked["_created_at"] + asked["_ttl"] - sent,
    }
    return _make_message(content, about)


def _make_message(content: RecordDict, about: dict[str, Any]) -> Message:
    metadata, message = Metadata.__new__(Metadata), Message.__new__(Message)
    metadata.__dict__.update(about, _delivered_at="")
    message.__dict__.update(_metadata=metadata, _content=content, _error=None)
    return message


def make_array(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    """Return an Array around a buffer without copying it; Flower's constructor takes bytes only."""
    array = Array.__new__(Array)
    array.__dict__.update(dtype=dtype, shape=shape, stype=stype, data=data)
    return array


def make_record(kind: type[Record], items: dict[str, Any]) -> Record:
    """Return a record of items of known types; Flower's constructors would check each of them."""
    record = kind.__new__(kind)
    record.__dict__.update(_empty(kind), _data=items)
    return record


@cache
def _empty(kind: type[Record]) -> dict[str, Any]:
    return dict(kind().__dict__)
