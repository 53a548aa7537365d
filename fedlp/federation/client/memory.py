"""Memory of clients between rounds: personal heads, residuals of compression, frozen tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedlp.errors import DataError
from fedlp.federation.client.store import ClientStore
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.digests import digest_tensors
from fedlp.models import state_tensors
from fedlp.types import SubModel, TrainInstruction


@dataclass(frozen=True, slots=True)
class ClientMemory:
    """Memory of the clients of a process.

    Attributes
    ----------
    seed : int
        Seed of initial personal heads.
    store : ClientStore or None
        Store of personal heads and residuals; None keeps neither.
    frozen : ClientStore or None
        Store of frozen tensors, which are sent once; None without frozen tensors.
    """

    submodels: SubModels
    seed: int
    store: ClientStore | None
    frozen: ClientStore | None

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

    def with_frozen(self, instruction: TrainInstruction) -> TrainInstruction:
        """Return the instruction completed by stored frozen tensors; received ones are stored.

        Raises
        ------
        DataError
            If the stored tensors of the instruction's digest are missing.
        """
        client_id, server_round = instruction.client_id, instruction.server_round
        frozen = {name: x for name, x in instruction.params.items() if name in self.submodels.spec.frozen}
        if not instruction.held:
            if frozen and self.frozen is not None:
                self.frozen.save(client_id, server_round, frozen)
            return instruction
        found = {} if self.frozen is None else self.frozen.load(client_id, before_round=server_round)
        if digest_tensors(found) != instruction.held:
            raise DataError(f"client {client_id} has lost the frozen tensors that it was sent; it needs them again")
        return replace(instruction, params={**instruction.params, **found}, held=b"")
