"""fedlp: federated learning in which pruning is a first-class part of every round.

The names below are the public API; each is imported when it is first used, so that ``import fedlp`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_API = {
    "simulate": "fedlp.apps.api",
    "run": "fedlp.apps.api",
    "prune": "fedlp.apps.api",
    "Result": "fedlp.apps.api",
    "Federation": "fedlp.apps.federate",
    "FedLPStrategy": "fedlp.federation.server.strategy",
    "register": "fedlp.registry",
    "Keep": "fedlp.types",
    "SubModel": "fedlp.types",
    "Assignment": "fedlp.types",
    "Budget": "fedlp.types",
    "AllocationRule": "fedlp.allocation.evidence",
    "UnitScore": "fedlp.pruning.scores.criterion",
    "LayerView": "fedlp.pruning.scores.view",
    "Evidence": "fedlp.allocation.evidence",
    "Aggregator": "fedlp.federation.aggregation.aggregator",
    "ServerOptimizer": "fedlp.federation.aggregation.server_optimizer",
    "Encoding": "fedlp.federation.wire.encodings.base",
    "Strategy": "fedlp.federation.strategies.policy",
    "Policy": "fedlp.federation.strategies.policy",
    "PolicyContext": "fedlp.federation.strategies.policy",
    "StatelessPolicy": "fedlp.federation.strategies.policy",
    "FixedPolicy": "fedlp.federation.strategies.policy",
}

__all__ = ["__version__", *_API]

if TYPE_CHECKING:
    from fedlp.allocation.evidence import AllocationRule, Evidence
    from fedlp.apps.api import Result, prune, run, simulate
    from fedlp.apps.federate import Federation
    from fedlp.federation.aggregation.aggregator import Aggregator
    from fedlp.federation.aggregation.server_optimizer import ServerOptimizer
    from fedlp.federation.server.strategy import FedLPStrategy
    from fedlp.federation.strategies.policy import FixedPolicy, Policy, PolicyContext, StatelessPolicy, Strategy
    from fedlp.federation.wire.encodings.base import Encoding
    from fedlp.pruning.scores.criterion import UnitScore
    from fedlp.pruning.scores.view import LayerView
    from fedlp.registry import register
    from fedlp.types import Assignment, Budget, Keep, SubModel


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'fedlp' has no attribute {name!r}")
    return getattr(import_module(_API[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
