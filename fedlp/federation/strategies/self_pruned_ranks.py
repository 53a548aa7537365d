"""Ranks of adapters that clients lower themselves: a policy around one that gives clients their first ranks.

A client's rank is its state. It is the one it returned last, held in the server's memory and hence in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedlp.federation.strategies.policy import Answer, Case, Memory, Policy
from fedlp.models.adapter_ranks import tail_start
from fedlp.types import Assignment, Keep, SubModel

RANKS = "ranks"


@dataclass(frozen=True)
class SelfPrunedRanks:
    """Policy of a method whose clients may cut the last ranks of their adapters.

    Attributes
    ----------
    method : Policy
        Gives every client its first ranks.
    num_ranks : int
        Ranks of the global model, >= 1.
    decay : float
        Share of the ranks that is left after a cut, in (0, 1).
    least : int
        Fewest ranks of a client, >= 1; a client that starts with fewer keeps them.
    """

    method: Policy
    num_ranks: int
    decay: float
    least: int

    def assign(
        self, server_round: int, client_id: int, memory: Memory, params: Mapping[str, Tensor] | None = None
    ) -> Assignment:
        """Return the method's assignment, with the client's ranks and the number that it may cut them to."""
        assigned = self.method.assign(server_round, client_id, memory, params)
        first = assigned.submodel.widths.get(RANKS, Keep.full(self.num_ranks)).count
        stored = memory.get(f"rank.{client_id}")
        rank = first if stored is None else min(first, int(stored))
        keep = Keep.first(rank, self.num_ranks)
        submodel = assigned.submodel if rank == first else SubModel(widths={RANKS: keep})
        left = tail_start(rank, self.decay, self.least)
        if left == rank:
            return replace(assigned, submodel=submodel)
        return replace(assigned, submodel=submodel, kept={RANKS: rank}, least={RANKS: left})

    def remember(self, memory: Memory, server_round: int, answers: Sequence[Answer]) -> Memory:
        """Return the memory with the ranks that clients returned."""
        ranks = {
            f"rank.{assigned.client_id}": torch.tensor(report.widths[RANKS].count)
            for assigned, report in answers
            if assigned.least
        }
        return {**self.method.remember(memory, server_round, answers), **ranks}

    def cases(self, client_ids: Sequence[int]) -> list[Case]:
        """Return the method's cases: those before any cut."""
        return self.method.cases(client_ids)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped policy."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.method, name)
