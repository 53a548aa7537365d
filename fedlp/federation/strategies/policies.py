"""Methods as policies: which sub-model a client gets and which tensors it returns.

FedLP (Zhu et al., ICC 2023), HeteroFL (Diao et al., ICLR 2021), FjORD (Horvath et al., NeurIPS 2021) and FedRolex (Alam
et al., NeurIPS 2022) differ only here; messages, aggregation and the round are the same for all.

A policy also states its distribution over sub-models, from which a dry run computes expected costs without drawing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from fedlp.config import StrategyConfig
from fedlp.errors import ConfigError
from fedlp.federation.server.sampling import depth_probabilities, sample_level, sample_uploads
from fedlp.federation.submodels import SubModels
from fedlp.rng import Stream
from fedlp.types import Keep, SubModel

Memory = Mapping[str, Tensor]
"""What a policy remembers from round to round: part of the server's state, so of every checkpoint."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a client gets and sends in one round; the fields are those of :class:`~fedlp.types.TrainInstruction`."""

    submodel: SubModel
    uploads: frozenset[str]
    kept: Mapping[str, int] = field(default_factory=dict)
    returned: Mapping[str, Keep] = field(default_factory=dict)
    scored: bool = False


@dataclass(frozen=True, slots=True)
class Returned:
    """What is remembered of a good update: whose it was, of how many examples, and units and their scores."""

    client_id: int
    num_examples: int
    held: Mapping[str, Keep]
    widths: Mapping[str, Keep]
    scores: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """One possible assignment.

    Attributes
    ----------
    submodel : SubModel
        What the client gets.
    probability : float
        How likely a client has it.
    layer_preserving_rate : float
        Rate at which its layers are sent.
    sent : SubModel or None
        What it sends of each layer; all it has where None.
    """

    submodel: SubModel
    probability: float
    layer_preserving_rate: float = 1.0
    sent: SubModel | None = None


class Policy(Protocol):
    """What a method decides for one client in one round."""

    def assign(self, server_round: int, client_id: int, memory: Memory) -> Assignment:
        """Return what the client gets and sends; AllocationError where its budget cannot be met."""

    def remember(self, memory: Memory, server_round: int, answers: Sequence[Returned]) -> Memory:
        """Return what to remember after a round, from the good updates in the order of client ids."""

    def cases(self, client_ids: Sequence[int]) -> list[Case]:
        """Return the distribution over assignments; probabilities sum to 1."""


class Forgetful(ABC):
    """A policy that remembers nothing."""

    @abstractmethod
    def submodel(self, server_round: int, client_id: int) -> SubModel:
        """Return the part of the global model that the client gets and trains."""

    @abstractmethod
    def uploads(self, server_round: int, client_id: int, submodel: SubModel) -> frozenset[str]:
        """Return the tensors that the client sends back."""

    def assign(self, server_round: int, client_id: int, memory: Memory) -> Assignment:
        """Return sub-model and uploads."""
        submodel = self.submodel(server_round, client_id)
        return Assignment(submodel, self.uploads(server_round, client_id, submodel))

    def remember(self, memory: Memory, server_round: int, answers: Sequence[Returned]) -> Memory:
        """Return what there is."""
        return memory


@dataclass(frozen=True)
class LayerUploads(Forgetful):
    """FedAvg and FedLP-Homo: the whole model down, each layer up with the client's layer-preserving rate."""

    seed: int
    submodels: SubModels
    rates: float | tuple[float, ...]
    mask_unit: str

    def rate(self, client_id: int) -> float:
        """Return the client's layer-preserving rate."""
        return self.rates if isinstance(self.rates, float) else self.rates[client_id]

    def submodel(self, server_round: int, client_id: int) -> SubModel:
        """Return the whole model."""
        return SubModel()

    def uploads(self, server_round: int, client_id: int, submodel: SubModel) -> frozenset[str]:
        """Return a fresh draw for this client and round."""
        rate, layers = self.rate(client_id), self.submodels.spec.layers
        if rate == 1.0:  # whatever is drawn, all is sent
            return self.submodels.layout(submodel).name_set
        return sample_uploads(self.seed, server_round, client_id, layers, rate, self.mask_unit)

    def cases(self, client_ids: Sequence[int]) -> list[Case]:
        """Return one case per client, or one for all."""
        if isinstance(self.rates, float):
            return [Case(SubModel(), 1.0, self.rates)]
        return [Case(SubModel(), 1.0 / len(client_ids), self.rate(client_id)) for client_id in client_ids]


@dataclass(frozen=True)
class DepthPrefixes(Forgetful):
    """FedLP-Hetero: a depth per client, drawn once; the shared prefix travels, the head below it stays personal."""

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


@dataclass(frozen=True)
class WidthSlices(Forgetful):
    """HeteroFL, FjORD and FedRolex: a width level per client, drawn once; all layers of the slice travel.

    ``kind``: ``heterofl`` keeps the first units of every axis; ``fjord`` too, and its local steps train random nested
    widths up to the client's; ``fedrolex`` moves the window by one unit every round. A level p keeps ceil(p * size)
    units of each axis, at least one.

    Deviations
    ----------
    Slices and averages are the papers'; what they add around them is not here: HeteroFL's scaler, static BatchNorm and
    masked loss, FjORD's self-distillation. BatchNorm statistics are averaged like every other tensor, or over the
    clients of the largest width alone (``batch_norm`` "whole"): those of a narrow model are not those of a wide one.
    """

    seed: int
    submodels: SubModels
    kind: str
    levels: tuple[float, ...]
    probabilities: tuple[float, ...]
    levels_by_client: tuple[float, ...] | None = None
    batch_norm: str = "average"

    def level(self, client_id: int) -> float:
        """Return the client's width in (0, 1]."""
        if self.levels_by_client is not None:
            return self.levels_by_client[client_id]
        return self.levels[sample_level(self.seed, Stream.WIDTHS, client_id, self.probabilities)]

    def submodel(self, server_round: int, client_id: int) -> SubModel:
        """Return the client's slice in this round."""
        return self.slice(server_round, self.level(client_id))

    def slice(self, server_round: int, level: float) -> SubModel:
        """Return the slice of a width level in a round."""
        start = server_round - 1 if self.kind == "fedrolex" else 0
        widths = {
            axis: Keep.window(start, max(1, math.ceil(level * size - 1e-9)), size)
            for axis, size in self.submodels.widths.axes.items()
            if level < 1
        }
        nested = tuple(sorted(p for p in self.levels if p <= level)) if self.kind == "fjord" else ()
        return SubModel(widths=widths, nested_levels=nested)

    def uploads(self, server_round: int, client_id: int, submodel: SubModel) -> frozenset[str]:
        """Return all tensors of the slice, maybe without the statistics of its batch norms."""
        names = self.submodels.layout(submodel).name_set
        largest = max(self.levels if self.levels_by_client is None else self.levels_by_client)
        narrow = self.batch_norm == "whole" and self.level(client_id) < largest
        if narrow or self.batch_norm == "static":
            names -= self.submodels.statistics
        return names

    def cases(self, client_ids: Sequence[int]) -> list[Case]:
        """Return one case per level, or one per client."""
        if self.levels_by_client is not None:
            return [Case(self.slice(1, self.level(client_id)), 1.0 / len(client_ids)) for client_id in client_ids]
        pairs = zip(self.levels, self.probabilities, strict=True)
        return [Case(self.slice(1, level), p) for level, p in pairs if p > 0]


def build_policy(config: StrategyConfig, seed: int, num_clients: int, submodels: SubModels) -> Policy:
    """Return the policy of a strategy config.

    Raises
    ------
    ConfigError
        For an unknown name, or values that do not fit the model or the number of clients.
    """
    if config.name in ("fedavg", "fedlp_homo", "oneshot"):
        rate = config.layer_preserving_rate
        rates = tuple(float(r) for r in rate) if isinstance(rate, list | tuple) else float(rate)
        return LayerUploads(seed, submodels, rates, config.mask_unit)
    if config.name == "fedlp_hetero":
        return _depth_policy(config, seed, submodels)
    if config.name in ("heterofl", "fjord", "fedrolex"):
        levels = tuple(config.widths)
        probabilities = config.width_probabilities or [1.0 / len(levels)] * len(levels)
        return WidthSlices(seed, submodels, config.name, levels, tuple(probabilities), batch_norm=config.batch_norm)
    raise ConfigError(
        f"strategy {config.name!r} does not exist; choose fedavg, fedlp_homo, fedlp_hetero, heterofl, fjord, fedrolex "
        "or oneshot"
    )


def _depth_policy(config: StrategyConfig, seed: int, submodels: SubModels) -> DepthPrefixes:
    num_depths = len(submodels.spec.depths)
    if num_depths == 1:
        raise ConfigError("fedlp_hetero needs a model with depth prefixes; this one has none: choose another model")
    depths = config.depths
    wanted = depths if isinstance(depths, list | tuple) else [] if depths == "u" else [depths]
    for depth in wanted:
        if not 1 <= depth <= num_depths:
            raise ConfigError(f"strategy.depths holds {depth}, but this model has depths 1 to {num_depths}")
    if isinstance(depths, list | tuple):
        return DepthPrefixes(seed, submodels, (), tuple(depths))
    return DepthPrefixes(seed, submodels, tuple(depth_probabilities(depths, num_depths)))


def fit_policy(policy: Policy, fit: Callable[[Sequence[SubModel]], tuple[int, ...]]) -> Policy:
    """Return a policy in which clients get what their budgets hold, instead of what a draw gives them.

    Parameters
    ----------
    fit : callable
        Returns which of some sub-models, from the smallest to the largest, each client gets; ConfigError where none.
    """
    match policy:
        case WidthSlices():
            levels = sorted(policy.levels)
            chosen = fit([policy.slice(1, level) for level in levels])
            return replace(policy, levels_by_client=tuple(levels[index] for index in chosen))
        case DepthPrefixes() if policy.depths is None:
            depths = range(1, len(policy.probabilities) + 1)
            return replace(policy, depths=tuple(index + 1 for index in fit([SubModel(depth=d) for d in depths])))
        case _:
            fit([SubModel()])  # everyone must hold the whole model
            return policy
