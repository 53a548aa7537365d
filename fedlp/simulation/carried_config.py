"""Config inside the messages of a resumed run under Flower.

Clients read a run's config from the run config of ``flwr run``. A resumed run names a folder alone, which is on the
server's disk: so the server sends its content along. These bytes count in no round, like those of any run config.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlp.config import from_yaml
from fedlp.federation.wire.record_access import read_config

_RUN_CONFIG = "run-config"


class CarryingGrid(Grid):
    """Grid that puts a config (YAML) into every message to a node."""

    def __init__(self, grid: Grid, cfg: str) -> None:
        self._grid = grid
        self._record = ConfigRecord({"cfg": cfg})

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, the config in each."""
        return self._grid.push_messages([self._load(message) for message in messages])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages, the config in each, and return the replies."""
        return self._grid.send_and_receive([self._load(message) for message in messages], timeout=timeout)

    def _load(self, message: Message) -> Message:
        about = message.metadata
        content = RecordDict({**message.content, _RUN_CONFIG: self._record})
        return Message(content, about.dst_node_id, about.message_type, ttl=about.ttl, group_id=about.group_id)

    # ---- as it is
    @property
    def run(self) -> Any:
        """Flower's description of the run."""
        return self._grid.run

    def set_run(self, run: Any) -> None:
        """Set Flower's description of the run."""
        self._grid.set_run(run)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to a node."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes that are there."""
        return self._grid.get_node_ids()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come."""
        return self._grid.pull_messages(message_ids)


def read_carried(content: RecordDict) -> tuple[str, Path] | None:
    """Return the config (YAML) in a message and the run directory that it goes on in; None if there is none."""
    if _RUN_CONFIG not in content:
        return None
    cfg = str(read_config(content, _RUN_CONFIG)["cfg"])
    return cfg, Path(str(from_yaml(cfg).resume))
