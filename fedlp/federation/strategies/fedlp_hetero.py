"""FedLP-Hetero (Zhu et al., ICC 2023): a depth prefix per client; the head below it stays personal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedlp.errors import ConfigError
from fedlp.federation.sampling import depth_probabilities, sample_level
from fedlp.federation.strategies.policy import Case, ClientOptions, Policy, PolicyContext, StatelessPolicy
from fedlp.federation.submodels import SubModels
from fedlp.registry import register
from fedlp.rng import Stream
from fedlp.types import SubModel


@register("strategy", "fedlp_hetero")
@dataclass(frozen=True)
class FedLPHetero:
    """A depth prefix per client; the head below it stays personal (Zhu et al., 2023).

    Attributes
    ----------
    depths : "u", int or list of int
        Distribution of depths: uniform, a depth (0.6 there, the rest shared), or one depth per client.
    persist_heads : bool
        Whether personal heads are kept between rounds.
    """

    depths: Any = "u"
    persist_heads: bool = True

    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        depths = self.depths
        whole = depths if isinstance(depths, list | tuple) else [depths]
        if depths != "u" and not all(isinstance(d, int) and not isinstance(d, bool) and d >= 1 for d in whole):
            raise ConfigError(
                f"strategy.depths={depths} is not allowed: it must be u, a depth (1, 2, ...), or a list with one depth "
                "per client"
            )

    @property
    def client(self) -> ClientOptions:
        """Options that clients read."""
        return ClientOptions(keeps_heads=self.persist_heads)

    def policy(self, context: PolicyContext) -> Policy:
        """Return the policy; ConfigError if the model lacks these depth prefixes."""
        depths, num_depths = self.depths, len(context.submodels.spec.depths)
        if num_depths == 1:
            raise ConfigError("fedlp_hetero needs a model with depth prefixes; this one has none: choose another model")
        wanted = depths if isinstance(depths, list | tuple) else [] if depths == "u" else [depths]
        for depth in wanted:
            if not 1 <= depth <= num_depths:
                raise ConfigError(f"strategy.depths holds {depth}, but this model has depths 1 to {num_depths}")
        if isinstance(depths, list | tuple):
            if len(depths) != context.num_clients:
                raise ConfigError(
                    f"strategy.depths=a list of {len(depths)} is not allowed: it must be one per client "
                    f"({context.num_clients})"
                )
            if context.is_limited:
                context.fit([SubModel()])
            return DepthPrefixes(context.seed, context.submodels, (), tuple(depths))
        chosen = None
        if context.is_limited:
            chosen = tuple(i + 1 for i in context.fit([SubModel(depth=d) for d in range(1, num_depths + 1)]))
        return DepthPrefixes(context.seed, context.submodels, tuple(depth_probabilities(depths, num_depths)), chosen)


@dataclass(frozen=True)
class DepthPrefixes(StatelessPolicy):
    """Policy: a depth per client, drawn once; the shared prefix travels."""

    seed: int
    submodels: SubModels
    probabilities: tuple[float, ...]
    depths: tuple[int, ...] | None = None

    def depth(self, client_id: int) -> int:
        """Return the client's depth in [1, number of depths]."""
        if self.depths is not None:
            return self.depths[client_id]
        return 1 + sample_level(self.seed, Stream.DEPTHS, client_id, self.probabilities)

    def submodel(self, server_round: int, client_id: int) -> SubModel:
        """Return the client's prefix."""
        return SubModel(depth=self.depth(client_id))

    def uploads(self, server_round: int, client_id: int, submodel: SubModel) -> frozenset[str]:
        """Return all shared tensors of the prefix."""
        return self.submodels.layout(submodel).name_set

    def cases(self, client_ids: Sequence[int]) -> list[Case]:
        """Return one case per depth."""
        if self.depths is not None:
            share = 1.0 / len(client_ids)
            return [Case(SubModel(depth=self.depth(client_id)), share) for client_id in client_ids]
        return [Case(SubModel(depth=depth), p) for depth, p in enumerate(self.probabilities, start=1) if p > 0]
