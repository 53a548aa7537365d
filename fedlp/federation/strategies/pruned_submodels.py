r"""Pruned sub-models: units by the pruner's score and refitted kept weights, per kind of client.

A kind is a distinct budget. Before the first round, and every ``refit_every`` rounds, the server prunes the global
model :math:`w` to each kind's budget: units :math:`S` and refitted values :math:`\hat w`. Between prunings a client of
that kind receives :math:`w_S + o` with the constant offset :math:`o = \hat w - w_S`; it returns differences, which are
added to the global model at :math:`S`. The global model so stays one value for all kinds. Units and offsets are part of
the policy's memory, hence of every checkpoint.

With adapters, :math:`w` is the base, and the model with merged adapters is pruned.

Running statistics of batch norms have no offset: they are re-measured before use.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.allocation.evidence import Evidence
from fedlp.errors import AllocationError, FedLPError
from fedlp.federation.strategies.plan_solver import PlanSolver
from fedlp.federation.strategies.policy import Memory, Offset, PolicyContext
from fedlp.types import Budget

log = logging.getLogger("fedlp")

_UNIT, _OFFSET, _ROUND = "unit", "offset", "pruned"  # first part of the names of remembered tensors


class PrunedSubModels:
    """Pruned sub-models of all kinds of clients of one run.

    Parameters
    ----------
    refit_every : int
        Rounds between prunings; pruned once if 0.
    """

    def __init__(self, context: PolicyContext, solver: PlanSolver, refit_every: int) -> None:
        self._context, self._solver, self.refit_every = context, solver, refit_every

    def prepare(self, memory: Memory, server_round: int, params: Mapping[str, Tensor]) -> Memory:
        """Return the memory with every kind's units and offset; fresh in a refit round or if absent.

        A kind whose budget is out of reach has none: its clients are refused. A kind with the whole model has
        none either. Where a refit fails, as without good answers of clients, the sub-models stay, with a warning.

        Raises
        ------
        FedLPError
            If a kind has no sub-model yet and pruning fails.
        """
        kinds = self._kinds()
        due = [kind for kind in kinds if self._is_due(memory, kind, server_round)]
        if not due:
            return memory
        try:
            return self._refit(memory, due, kinds, server_round, params)
        except FedLPError as error:
            if any(f"{_ROUND}.{kind}" not in memory for kind in due):
                raise
            log.warning("round %d: pruned sub-models stay as they are: %s", server_round, error)
            return memory

    def _refit(
        self,
        memory: Memory,
        due: list[str],
        kinds: Mapping[str, int],
        server_round: int,
        params: Mapping[str, Tensor],
    ) -> Memory:
        """Return the memory with fresh units and offsets of some kinds."""
        pruner = self._context.pruner
        assert pruner is not None
        found = {name: tensor for name, tensor in memory.items() if not _is_of(name, due)}
        evidence = pruner.evidence(params)
        for kind in due:
            with suppress(AllocationError):  # said in every round in which such a client would take part
                found |= dict(self._prune(kind, kinds[kind], server_round, params, evidence))
        return found

    def units(self, client_id: int, memory: Memory) -> dict[str, NDArray[np.int64]]:
        """Return the units of each axis of a client; empty if it has no pruned sub-model."""
        prefix = f"{_UNIT}.{kind_of(self._context.budgets[client_id])}."
        names = [layer.name for layer in self._context.submodels.layers]
        return {x: np.flatnonzero(memory[prefix + x].numpy()) for x in names if prefix + x in memory}

    def offset(self, client_id: int, memory: Memory) -> Offset:
        """Return the offset of a client's received values."""
        kind = kind_of(self._context.budgets[client_id])
        prefix = f"{_OFFSET}.{kind}."
        values = {name.removeprefix(prefix): tensor for name, tensor in memory.items() if name.startswith(prefix)}
        return Offset(kind, values) if values else Offset()

    def _kinds(self) -> dict[str, int]:
        """Return each kind, and the first client of it."""
        found: dict[str, int] = {}
        for client_id, budget in enumerate(self._context.budgets):
            if budget is not None:
                found.setdefault(kind_of(budget), client_id)
        return found

    def _is_due(self, memory: Memory, kind: str, server_round: int) -> bool:
        last = memory.get(f"{_ROUND}.{kind}")
        if last is None:
            return True
        return self.refit_every > 0 and (server_round - 1) % self.refit_every == 0 and int(last) != server_round

    def _prune(
        self, kind: str, client_id: int, server_round: int, params: Mapping[str, Tensor], evidence: Evidence
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the memory entries of a kind."""
        yield f"{_ROUND}.{kind}", torch.tensor(server_round)
        layers = self._context.submodels.layers
        kept = self._solver.held(client_id, evidence)
        if all(kept[layer.name] == layer.num_units for layer in layers):
            return
        assert self._context.pruner is not None
        widths, offset = self._context.pruner.prune(params, kept)
        for axis, keep in widths.items():
            held = torch.zeros(keep.size, dtype=torch.bool)
            held[torch.from_numpy(keep.indices())] = True
            yield f"{_UNIT}.{kind}.{axis}", held
        for name, values in offset.items():
            if bool(values.any()):
                yield f"{_OFFSET}.{kind}.{name}", values


def kind_of(budget: Budget | None) -> str:
    """Return the short name shared by clients of equal budgets."""
    return hashlib.blake2b(repr(budget).encode(), digest_size=6).hexdigest()


def _is_of(name: str, kinds: list[str]) -> bool:
    part, _, rest = name.partition(".")
    return part in (_UNIT, _OFFSET, _ROUND) and rest.partition(".")[0] in kinds
