"""Structured config of a federated search for an allocation function."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fedlp.config.schema import RunConfig
from fedlp.config.tools import SearchSettings


@dataclass
class FederatedSearchConfig(RunConfig):
    """Search for an allocation function that clients judge, ``fedlp-search federated=true``."""

    command: ClassVar[str] = "fedlp-search federated=true"
    trains: ClassVar[bool] = False
    unread: ClassVar[frozenset[str]] = frozenset(
        {"strategy", "upload", "download", "aggregator", "server_optimizer", "local", "rounds", "num_rounds"}
        | {"eval_every", "checkpoint_every", "keep_best", "callbacks", "objective", "allocator", "eval_batch_size"}
    )

    federated: bool = True
    run: str | None = None  # run directory whose model is searched on, with its own ``model``, ``dataset`` and clients
    sums: str = "float32"  # type of clients' sums, and of the refits that they get: "float32" or "float64"
    search: SearchSettings = field(default_factory=SearchSettings)
