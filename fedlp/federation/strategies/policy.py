"""Protocol of strategies: which sub-model a client gets in a round, and which of its tensors it returns.

FedLP (Zhu et al., ICC 2023), HeteroFL (Diao et al., ICLR 2021), FjORD (Horvath et al., NeurIPS 2021) and FedRolex (Alam
et al., NeurIPS 2022) differ only here; messages, aggregation and the round are the same for all.

A part of kind ``strategy`` holds a method's options, and makes a :class:`Policy` for one model and one fleet. A policy
also states its distribution over sub-models, from which a dry run computes expected costs without drawing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from fedlp.allocation.budget.costs import CostModel
from fedlp.allocation.evidence import AllocationRule, Evidence
from fedlp.errors import AllocationError
from fedlp.federation.submodels import SubModels
from fedlp.types import Assignment, Budget, ClientReport, Keep, SubModel

Memory = Mapping[str, Tensor]
"""Memory of a policy between rounds: part of the server's state, hence of every checkpoint."""

Answer = tuple[Assignment, ClientReport]
"""A client's assignment, and its good answer."""


@dataclass(frozen=True, slots=True)
class Case:
    """One possible assignment.

    Attributes
    ----------
    submodel : SubModel
        Sub-model that the client gets.
    probability : float
        Probability that a client has it, in [0, 1].
    layer_preserving_rate : float
        Rate at which its layers are sent, in [0, 1].
    sent : SubModel or None
        Part of each layer that it sends; all of the sub-model if None.
    """

    submodel: SubModel
    probability: float
    layer_preserving_rate: float = 1.0
    sent: SubModel | None = None


@dataclass(frozen=True, slots=True)
class Holding:
    """A part of the model that some clients return in a round, if they take part.

    Attributes
    ----------
    submodel : SubModel
        Sub-model that is returned.
    uploads : frozenset of str
        Tensors that are returned.
    count : float
        Expected number of these clients.
    """

    submodel: SubModel
    uploads: frozenset[str]
    count: float


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Options of a strategy that clients read.

    Attributes
    ----------
    keeps_heads : bool
        Whether personal heads are kept between rounds.
    train_sent : bool
        Whether only entries that will be sent are trained, if the server selects the units.
    criterion, scores : str
        Values whose loss scores measure, "weights" or "update" of them; precision of scores, "fine" or "coarse".
    compensate : bool
        Whether the sent weights compensate for the units left out.
    """

    keeps_heads: bool = False
    train_sent: bool = False
    criterion: str = "weights"
    compensate: bool = False
    scores: str = "fine"


class Offset(NamedTuple):
    """Constant difference of a client's received values from the global values at its units.

    Attributes
    ----------
    kind : str
        Clients of equal kind share sub-model and offset; empty if there is no offset.
    values : mapping from tensor name to Tensor
        In the shapes of the sub-model.
    """

    kind: str = ""
    values: Mapping[str, Tensor] = {}


class ServerPruner(Protocol):
    """Pruning on the server, with calibration examples of its own or on clients' sums."""

    @property
    def asks_clients(self) -> bool:
        """Whether each pruning costs clients a pass over examples of theirs."""

    def evidence(self, params: Mapping[str, Tensor]) -> Evidence:
        """Return the evidence of the global model for allocation rules."""

    def prune(
        self, params: Mapping[str, Tensor], kept: Mapping[str, int]
    ) -> tuple[Mapping[str, Keep], Mapping[str, Tensor]]:
        """Return the kept units of each layer, and the differences of refitted from global values."""


@dataclass(frozen=True)
class PolicyContext:
    """Context of a policy: model, budgets and parts.

    Attributes
    ----------
    budgets : tuple of Budget or None
        One per client.
    fit : callable
        Returns the index of the largest of some sub-models, in rising order, that each client's budget holds;
        ConfigError if none does.
    layer_costs : callable
        Returns the costs of any choice of units of the prunable layers.
    allocator : AllocationRule
        Rule that divides a budget among layers.
    batch_norm : "average", "whole" or "static"
        Whose running statistics enter the global model.
    scores_units : bool
        Whether the pruner's score reads the client's data or weights; else it is random.
    sends_deltas : bool
        Whether updates are differences from the received values.
    pruner : ServerPruner or None
        Pruning on the server, on its calibration examples or on clients' sums.
    is_pretrained : bool
        Whether training starts from pretrained weights.
    """

    seed: int
    num_clients: int
    num_rounds: int
    submodels: SubModels
    budgets: tuple[Budget | None, ...]
    fit: Callable[[Sequence[SubModel]], tuple[int, ...]]
    layer_costs: Callable[[], CostModel]
    allocator: AllocationRule
    batch_norm: str = "average"
    scores_units: bool = True
    sends_deltas: bool = False
    pruner: ServerPruner | None = None
    is_pretrained: bool = False

    @property
    def is_limited(self) -> bool:
        """Whether some client has a budget."""
        return any(budget is not None for budget in self.budgets)


class Policy(Protocol):
    """Decisions of a method for one client in one round."""

    def assign(
        self, server_round: int, client_id: int, memory: Memory, params: Mapping[str, Tensor] | None = None
    ) -> Assignment:
        """Return the client's assignment; AllocationError if its budget cannot be met.

        Parameters
        ----------
        params : mapping from tensor name to Tensor, optional
            Global values; ignored by policies that do not read them.
        """

    def remember(self, memory: Memory, server_round: int, answers: Sequence[Answer]) -> Memory:
        """Return the memory after a round, from the good answers in the order of client ids."""

    def cases(self, client_ids: Sequence[int]) -> list[Case]:
        """Return the distribution over assignments; probabilities sum to 1."""


class Strategy(Protocol):
    """Protocol of the kind ``strategy``: a method's options.

    Attributes
    ----------
    client : ClientOptions
        Optional; a plain method's if absent.
    """

    def policy(self, context: PolicyContext) -> Policy:
        """Return the method's policy; ConfigError for options that do not fit the model or the number of clients."""


class StatelessPolicy(ABC):
    """Policy without memory: a sub-model and an upload set per client and round."""

    @abstractmethod
    def submodel(self, server_round: int, client_id: int) -> SubModel:
        """Return the part of the global model that the client gets and trains."""

    @abstractmethod
    def uploads(self, server_round: int, client_id: int, submodel: SubModel) -> frozenset[str]:
        """Return the tensors that the client sends back."""

    def assign(
        self, server_round: int, client_id: int, memory: Memory, params: Mapping[str, Tensor] | None = None
    ) -> Assignment:
        """Return sub-model and uploads."""
        submodel = self.submodel(server_round, client_id)
        return Assignment(server_round, client_id, submodel, self.uploads(server_round, client_id, submodel))

    def remember(self, memory: Memory, server_round: int, answers: Sequence[Answer]) -> Memory:
        """Stateless: return memory unchanged."""
        return memory


def client_options(strategy: object) -> ClientOptions:
    """Return the options of a strategy that clients read."""
    found = getattr(strategy, "client", None)
    return found if isinstance(found, ClientOptions) else ClientOptions()


def settled(policy: Policy) -> Policy:
    """Return the policy that assigns each client its best sub-model, without exploration; by default unchanged."""
    method = getattr(policy, "settled", None)
    found: Policy = policy if method is None else method()
    return found


def prepared(policy: Policy, memory: Memory, server_round: int, params: Mapping[str, Tensor]) -> Memory:
    """Return the memory at the start of a round; unchanged for a policy without ``prepare``."""
    method = getattr(policy, "prepare", None)
    found: Memory = memory if method is None else method(memory, server_round, params)
    return found


def offset_of(policy: Policy, client_id: int, memory: Memory) -> Offset:
    """Return the offset of a client's received values; none for a policy without ``offset``."""
    method = getattr(policy, "offset", None)
    found: Offset = Offset() if method is None else method(client_id, memory)
    return found


def holdings_of(
    policy: Policy, server_round: int, client_ids: Sequence[int], memory: Memory, params: Mapping[str, Tensor]
) -> list[Holding]:
    """Return the expected uploads of all clients together in a round, as assigned by the server.

    A policy may have a method ``holdings(server_round, client_ids)``, for expectations over draws or for speed.
    Clients whose budget cannot be met are left out.
    """
    method = getattr(policy, "holdings", None)
    if method is not None:
        found: list[Holding] = method(server_round, client_ids)
        return found
    counts: Counter[tuple[int | None, tuple[tuple[str, Keep], ...], frozenset[str]]] = Counter()
    for client_id in client_ids:
        with suppress(AllocationError):
            assigned = policy.assign(server_round, client_id, memory, params)
            widths = {**assigned.submodel.widths, **assigned.returned}
            counts[assigned.submodel.depth, tuple(sorted(widths.items())), assigned.uploads] += 1
    return [
        Holding(SubModel(depth, dict(widths)), uploads, count) for (depth, widths, uploads), count in counts.items()
    ]


@dataclass(frozen=True)
class FixedPolicy(StatelessPolicy):
    """Policy of a function ``(server_round, client_id) -> SubModel``; all tensors of the sub-model come back."""

    context: PolicyContext
    choose: Callable[[int, int], SubModel] = field(default=lambda server_round, client_id: SubModel())

    def submodel(self, server_round: int, client_id: int) -> SubModel:
        """Return the function's sub-model."""
        return self.choose(server_round, client_id)

    def uploads(self, server_round: int, client_id: int, submodel: SubModel) -> frozenset[str]:
        """Return all tensors of the sub-model."""
        return self.context.submodels.layout(submodel).name_set

    def cases(self, client_ids: Sequence[int]) -> list[Case]:
        """Return one case per client, as in the first round."""
        return [Case(self.choose(1, client_id), 1.0 / len(client_ids)) for client_id in client_ids]
