"""Protocol of aggregators, and the coverage average, which all published methods here use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedlp.federation.aggregation.clipped_average import ClippedAverage
from fedlp.federation.aggregation.coverage import Keeps
from fedlp.federation.aggregation.coverage_average import CoverageAverage
from fedlp.federation.aggregation.norm_bounds import check_multiples
from fedlp.registry import register


class Accumulator(Protocol):
    """Aggregation of one round, fed one update at a time."""

    def add(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weight: float) -> None:
        """Count in one client's update.

        Parameters
        ----------
        params : mapping from tensor name to Tensor
            Returned values; any subset of the global names. Not modified.
        keeps : mapping from tensor name to one Keep per dimension
            Global indices that a returned tensor covers; the whole tensor where the name is absent.
        weight : float
            Client's weight, finite and > 0.
        """

    def result(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the new global values, and the fraction of each tensor's entries returned by at least one client.

        Entries without an update keep their old bits.
        """

    def covered(self, name: str) -> bool | Tensor:
        """Return whether each entry has an update: True or False for all, else booleans of the tensor's shape."""


def add_stack(
    average: Accumulator, stacks: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weights: Mapping[int, float]
) -> None:
    """Count in updates of several clients that cover the same entries.

    An accumulator may have a method ``add_stack`` of its own; else they are added one by one.

    Parameters
    ----------
    stacks : mapping from tensor name to (clients, ...)
        Returned values of each client.
    keeps : mapping from tensor name to one Keep per dimension
        Global indices that the tensors cover.
    weights : mapping from int to float
        Weight of each client to count in, by its position.
    """
    method, count = getattr(average, "add_stack", None), len(next(iter(stacks.values()), ()))
    if method is not None and weights:
        at = None if len(weights) == count else torch.tensor(list(weights))
        chosen = stacks if at is None else {name: stack.index_select(0, at) for name, stack in stacks.items()}
        method(chosen, keeps, list(weights.values()))
        return
    for k, weight in weights.items():
        average.add({name: stack[k] for name, stack in stacks.items()}, keeps, weight)


class Aggregator(Protocol):
    """Protocol of the kind ``aggregator``.

    Two attributes are read where a class has them: ``begin_round(params, trainable)``, called in place of :meth:`begin`
    with the names of the tensors that clients train, and ``max_examples``, the largest number of examples that counts,
    as a multiple of the cohort's median.
    """

    def begin(self, params: Mapping[str, Tensor]) -> Accumulator:
        """Return an accumulator for one round over the current global values, which it does not modify."""


@register("aggregator", "coverage_average")
@dataclass(frozen=True)
class CoverageAverageRule:
    """Weighted average of each entry over the clients that returned it, of bounded norms and weights.

    Attributes
    ----------
    max_norm : float or None
        Largest norm of an update, as a multiple of the round's median for the client's sub-model, >= 1; longer ones are
        scaled down. Where clients differ more, three robust standard deviations. None for no bound.
    max_examples : float or None
        Largest number of examples that counts, as a multiple of the cohort's median, >= 1. None for no bound.
    """

    max_norm: float | None = 3.0
    max_examples: float | None = 10.0

    def __post_init__(self) -> None:
        check_multiples(max_norm=self.max_norm, max_examples=self.max_examples)

    def begin(self, params: Mapping[str, Tensor]) -> Accumulator:
        """Return an accumulator; all tensors have one bound."""
        return self.begin_round(params, params)

    def begin_round(self, params: Mapping[str, Tensor], trainable: Collection[str]) -> Accumulator:
        """Return an accumulator; streaming, float64."""
        if self.max_norm is None:
            return CoverageAverage(params)
        return ClippedAverage(params, self.max_norm, trainable)
