"""Structured config of federated one-shot pruning, and its form in earlier versions: ``strategy=oneshot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedlp.config.aliases import current_override, tell_once
from fedlp.config.federated_search import FederatedSearchConfig
from fedlp.config.schema import RunConfig
from fedlp.config.tools import FinetuneConfig, PruneConfig


@dataclass
class FederatedPruneConfig(RunConfig):
    """Federated one-shot pruning, ``fedlp-prune federated=true``, to one of ``sparsity`` and the two targets."""

    command: ClassVar[str] = "fedlp-prune federated=true"
    trains: ClassVar[bool] = False
    unread: ClassVar[frozenset[str]] = frozenset(
        {"strategy", "upload", "download", "aggregator", "server_optimizer", "local", "rounds", "num_rounds"}
        | {"eval_every", "checkpoint_every", "keep_best", "callbacks", "objective"}
    )

    federated: bool = True
    sparsity: float | None = None  # fraction removed of the prunable parameters, in (0, 1)
    target_params: float | None = None  # largest number of parameters of the pruned model
    target_macs: float | None = None  # largest number of multiply-accumulates per example
    unit_selection: str = "server"  # "server": pruning on pooled moments; "client": clients prune alone and vote
    sums: str = "float32"  # type of clients' sums: "float32" or "float64"
    onnx: bool = False  # whether model.onnx is written too, in float32
    dtype: str = "auto"  # written weights: "float32", "float16", "bfloat16", or "auto": that of the source

    def central(self) -> PruneConfig:
        """Return the config of the same central pruning."""
        shared = ("seed", "eval_batch_size", "model", "dataset", "task", "pruner", "allocator", "calibration", "device")
        own = ("sparsity", "target_params", "target_macs", "onnx", "dtype")
        values = {name: getattr(self, name) for name in (*shared, *own)}
        return PruneConfig(**values, finetune=FinetuneConfig(name="none"))


def schema_for(values: Mapping[str, Any]) -> type[RunConfig]:
    """Return the schema of a run's plain config."""
    if not values.get("federated"):
        return RunConfig
    return FederatedSearchConfig if "search" in values else FederatedPruneConfig


_BEFORE = {"model": "fedlp_cnn", "dataset": "digits", "sparsity": "0.33"}  # defaults of strategy=oneshot


def federated_prune_overrides(overrides: Sequence[str]) -> list[str] | None:
    """Return the overrides of ``fedlp-prune federated=true`` behind a command line; None for any other run.

    Options of ``strategy=oneshot``, its name in earlier versions, become those of the root.
    """
    if "federated=true" in overrides:
        return list(overrides)
    if not {"strategy=oneshot", "strategy.name=oneshot"} & set(overrides):
        return None
    tell_once("fedlp strategy=oneshot", "fedlp-prune federated=true")
    kept = [current_override(word) for word in overrides if word not in ("strategy=oneshot", "strategy.name=oneshot")]
    moved = [word.removeprefix("strategy.") for word in kept]
    given = {word.partition("=")[0] for word in moved}
    return moved + [f"{name}={value}" for name, value in _BEFORE.items() if name not in given]
