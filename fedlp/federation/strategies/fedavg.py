"""FedAvg (McMahan et al., AISTATS 2017): the whole model down, all layers up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedlp.federation.strategies.fedlp_homo import LayerUploads
from fedlp.federation.strategies.policy import Policy, PolicyContext
from fedlp.registry import register


@register("strategy", "fedavg")
@dataclass(frozen=True)
class FedAvg:
    """The whole model down, all layers up (McMahan et al., 2017)."""

    reads: ClassVar[frozenset[str]] = frozenset()

    def policy(self, context: PolicyContext) -> Policy:
        """Return the policy."""
        return LayerUploads.of(context, 1.0, "layer")
