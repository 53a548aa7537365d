"""Memory of clients between rounds: personal heads, residuals of compression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlp.federation.client.store import ClientStore
from fedlp.federation.submodels import SubModels
from fedlp.models import state_tensors
from fedlp.types import SubModel


@dataclass(frozen=True, slots=True)
class ClientMemory:
    """Memory of the clients of a process.

    Attributes
    ----------
    seed : int
        Seed of initial personal heads.
    store : ClientStore or None
        Store of personal heads and residuals; None keeps neither.
    """

    submodels: SubModels
    seed: int
    store: ClientStore | None

    def keep(self, client_id: int, server_round: int, tensors: Mapping[str, Tensor]) -> None:
        """Store a client's personal head or residual after a round, unless it is empty."""
        if tensors and self.store is not None:
            self.store.save(client_id, server_round, tensors)

    def personal(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that belong to a personal head, not to the global model."""
        return {name: tensor for name, tensor in tensors.items() if name not in self.submodels.spec.tensors}

    def head(self, submodel: SubModel, client_id: int, before_round: int) -> Mapping[str, Tensor]:
        """Return the client's personal head: last trained before the round, or the initial one."""
        depth = submodel.depth
        if depth is None or depth == len(self.submodels.spec.depths):
            return {}
        if self.store is not None and (head := self.store.load(client_id, before_round)):
            return head
        return self.personal(state_tensors(self.submodels.spec.build_depth(depth, self.seed, client_id)))

    def residual(self, client_id: int, before_round: int) -> Mapping[str, Tensor]:
        """Return the client's residual of earlier uploads."""
        return {} if self.store is None else self.store.load(client_id, before_round)
