"""Federated one-shot pruning: options of ``fedlp-prune federated=true``; no model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedlp.allocation.evidence import needs_of
from fedlp.errors import ConfigError
from fedlp.federation.strategies.policy import FixedPolicy, Policy, PolicyContext
from fedlp.registry import register


@register("strategy", "oneshot")
@dataclass(frozen=True)
class OneShot:
    """One-shot pruning on second moments pooled over clients; no model is trained.

    Attributes
    ----------
    sparsity : float
        Fraction of the prunable parameters that is removed, in (0, 1).
    unit_selection : "server" or "client"
        The server prunes on pooled moments, or each client prunes alone and votes.
    sums : "float32" or "float64"
        Type in which clients send sums.
    """

    sparsity: float = 0.33
    unit_selection: str = "server"
    sums: str = "float32"

    reads: ClassVar[frozenset[str]] = frozenset({"allocator", "pruner", "calibration"})
    ignores: ClassVar[frozenset[str]] = frozenset({"upload", "aggregator", "server_optimizer"})

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ConfigError(f"strategy.sparsity={self.sparsity} is not allowed: it must be in (0, 1)")
        for name, value, allowed in (
            ("unit_selection", self.unit_selection, ("server", "client")),
            ("sums", self.sums, ("float32", "float64")),
        ):
            if value not in allowed:
                raise ConfigError(f"strategy.{name}={value} is not allowed: it must be one of {', '.join(allowed)}")

    def policy(self, context: PolicyContext) -> Policy:
        """Return the policy of the whole model; ConfigError for budgets, or an allocator that needs data."""
        if context.is_limited:
            raise ConfigError("a fleet with budgets does not go with strategy=oneshot: all clients get one model")
        if missing := sorted(needs_of(context.allocator) - {"weights"}):
            raise ConfigError(
                f"the allocator needs {missing[0]}, which the server has not; strategy=oneshot takes rules of depth or "
                "weights: uniform, depth_line, log_depth, alphapruning, erk, plan"
            )
        return FixedPolicy(context)
