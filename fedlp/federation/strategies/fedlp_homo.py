"""FedLP-Homo (Zhu et al., ICC 2023): the whole model down, each layer up with the layer-preserving rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedlp.errors import ConfigError
from fedlp.federation.sampling import sample_uploads
from fedlp.federation.strategies.policy import Case, Holding, Policy, PolicyContext, StatelessPolicy
from fedlp.federation.submodels import SubModels
from fedlp.registry import register
from fedlp.types import SubModel


@register("strategy", "fedlp_homo")
@dataclass(frozen=True)
class FedLPHomo:
    """The whole model down, each layer up with the layer-preserving rate (Zhu et al., 2023).

    Attributes
    ----------
    layer_preserving_rate : float or list of float
        Probability that a layer is uploaded, in [0, 1]; a list has one per client.
    upload_unit : "layer" or "tensor"
        Unit of the draw; "tensor" as in FedLP's official code.
    """

    layer_preserving_rate: Any = 0.5
    upload_unit: str = "layer"

    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_rates(self.layer_preserving_rate, self.upload_unit)

    def policy(self, context: PolicyContext) -> Policy:
        """Return the policy; ConfigError unless there is one rate, or one per client."""
        return LayerUploads.of(context, client_rates(self.layer_preserving_rate, context.num_clients), self.upload_unit)


@dataclass(frozen=True)
class LayerUploads(StatelessPolicy):
    """Policy: the whole model down, each layer up with the client's layer-preserving rate."""

    seed: int
    submodels: SubModels
    rates: float | tuple[float, ...]
    upload_unit: str

    @classmethod
    def of(cls, context: PolicyContext, rates: float | tuple[float, ...], upload_unit: str) -> LayerUploads:
        """Return the policy, after checking that every budget holds the whole model."""
        if context.is_limited:
            context.fit([SubModel()])
        return cls(context.seed, context.submodels, rates, upload_unit)

    def rate(self, client_id: int) -> float:
        """Return the client's layer-preserving rate."""
        return self.rates if isinstance(self.rates, float) else self.rates[client_id]

    def submodel(self, server_round: int, client_id: int) -> SubModel:
        """Return the whole model."""
        return SubModel()

    def uploads(self, server_round: int, client_id: int, submodel: SubModel) -> frozenset[str]:
        """Return a fresh draw for this client and round."""
        rate, layers = self.rate(client_id), self.submodels.spec.layers
        if rate == 1.0:  # all is sent, for any draw
            return self.submodels.layout(submodel).name_set
        return sample_uploads(self.seed, server_round, client_id, layers, rate, self.upload_unit)

    def holdings(self, server_round: int, client_ids: Sequence[int]) -> list[Holding]:
        """Return one holding of the whole model: each tensor is returned by the sum of the rates of clients."""
        rates = self.rates
        count = (
            rates * len(client_ids) if isinstance(rates, float) else sum(rates[client_id] for client_id in client_ids)
        )
        return [Holding(SubModel(), self.submodels.layout(SubModel()).name_set, count)]

    def cases(self, client_ids: Sequence[int]) -> list[Case]:
        """Return one case per client, or one for all."""
        if isinstance(self.rates, float):
            return [Case(SubModel(), 1.0, self.rates)]
        return [Case(SubModel(), 1.0 / len(client_ids), self.rate(client_id)) for client_id in client_ids]


def check_rates(rates: Any, upload_unit: str) -> None:
    """Raise ConfigError for a layer-preserving rate outside [0, 1] or an unknown unit."""
    for value in rates if isinstance(rates, list | tuple) else [rates]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"strategy.layer_preserving_rate={value} is not allowed: it must be in [0, 1]")
    if upload_unit not in ("layer", "tensor"):
        raise ConfigError(f"strategy.upload_unit={upload_unit} is not allowed: it must be one of layer, tensor")


def client_rates(rates: Any, num_clients: int) -> float | tuple[float, ...]:
    """Return one rate for all, or one per client; ConfigError if a list has another length."""
    if not isinstance(rates, list | tuple):
        return float(rates)
    if len(rates) != num_clients:
        raise ConfigError(
            f"strategy.layer_preserving_rate=a list of {len(rates)} is not allowed: it must be one number, or one per "
            f"client ({num_clients})"
        )
    return tuple(float(rate) for rate in rates)
