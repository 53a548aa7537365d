"""Width slices: a width level per client, drawn once; all layers of the slice travel.

HeteroFL, FjORD and FedRolex differ in the start of a slice and in its training. A level p keeps ceil(p * size)
units of each axis, at least one.

Deviations
----------
Slices and averages are the papers'; HeteroFL's scaler, static BatchNorm and masked loss, and FjORD's self-distillation
are not here. ``aggregator.batch_norm`` says whose BatchNorm statistics enter the global model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

from fedlp.errors import ConfigError
from fedlp.federation.sampling import sample_level
from fedlp.federation.strategies.policy import Case, Policy, PolicyContext, StatelessPolicy
from fedlp.federation.submodels import SubModels
from fedlp.rng import Stream
from fedlp.types import Keep, SubModel


@dataclass(frozen=True)
class WidthStrategy:
    """Options of a method of width slices.

    Attributes
    ----------
    widths : list of float
        Width levels, each in (0, 1].
    width_probabilities : list of float or None
        Fraction of clients at each level; uniform if None.
    """

    widths: list[float] = field(default_factory=lambda: [1.0])
    width_probabilities: list[float] | None = None

    reads: ClassVar[frozenset[str]] = frozenset()
    rolls: ClassVar[bool] = False
    nests: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.widths or not all(0 < width <= 1 for width in self.widths):
            raise ConfigError(f"strategy.widths={self.widths} is not allowed: it must be levels in (0, 1]")
        shares = self.width_probabilities
        fits = shares is None or (len(shares) == len(self.widths) and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6)
        if not fits:
            raise ConfigError(
                f"strategy.width_probabilities={shares} is not allowed: it must be one share per width, summing to 1"
            )

    def policy(self, context: PolicyContext) -> Policy:
        """Return the policy; with budgets each client gets the largest level within its budget."""
        levels = tuple(self.widths)
        if min(levels) < 1 and not context.submodels.widths.axes:
            context.submodels.refuse_narrow(f"strategy.widths={list(levels)} asks for narrow sub-models")
        shares = self.width_probabilities or [1.0 / len(levels)] * len(levels)
        drawn = WidthSlices(
            context.seed, context.submodels, self.rolls, self.nests, levels, tuple(shares), None, context.batch_norm
        )
        if not context.is_limited:
            return drawn
        ordered = sorted(levels)
        chosen = context.fit([drawn.slice(1, level) for level in ordered])
        return replace(drawn, levels_by_client=tuple(ordered[index] for index in chosen))


@dataclass(frozen=True)
class WidthSlices(StatelessPolicy):
    """Policy of width slices.

    Attributes
    ----------
    rolls : bool
        Whether the window moves by one unit every round (FedRolex); else the first units of every axis are kept.
    nests : bool
        Whether local steps train random nested widths up to the client's (FjORD).
    """

    seed: int
    submodels: SubModels
    rolls: bool
    nests: bool
    levels: tuple[float, ...]
    probabilities: tuple[float, ...]
    levels_by_client: tuple[float, ...] | None = None
    batch_norm: str = "average"

    @property
    def measures_statistics(self) -> bool:
        """Whether batch norm statistics are measured before an evaluation, and never sent."""
        return self.batch_norm == "static"

    def level(self, client_id: int) -> float:
        """Return the client's width in (0, 1]."""
        if self.levels_by_client is not None:
            return self.levels_by_client[client_id]
        if client_id not in self._drawn:
            self._drawn[client_id] = self._draw(client_id)
        return self._drawn[client_id]

    @cached_property
    def _drawn(self) -> dict[int, float]:
        """Widths by client, as far as they were asked for."""
        return {}

    def _draw(self, client_id: int) -> float:
        return self.levels[sample_level(self.seed, Stream.WIDTHS, client_id, self.probabilities)]

    def submodel(self, server_round: int, client_id: int) -> SubModel:
        """Return the client's slice in this round."""
        return self.slice(server_round, self.level(client_id))

    def slice(self, server_round: int, level: float) -> SubModel:
        """Return the slice of a width level in a round."""
        start = server_round - 1 if self.rolls else 0
        widths = {
            axis: Keep.window(start, max(1, math.ceil(level * size - 1e-9)), size)
            for axis, size in self.submodels.widths.axes.items()
            if level < 1
        }
        nested = tuple(sorted(p for p in self.levels if p <= level)) if self.nests else ()
        return SubModel(widths=widths, nested_levels=nested)

    def uploads(self, server_round: int, client_id: int, submodel: SubModel) -> frozenset[str]:
        """Return all tensors of the slice, with or without the statistics of its batch norms."""
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
