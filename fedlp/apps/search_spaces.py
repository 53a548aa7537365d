"""Search spaces on one model: typed expression trees, and DSA's published chains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlp.allocation import dsa_chains as dsa
from fedlp.allocation.search.evolution import Plan
from fedlp.allocation.search.expressions import Expression, evaluate, is_degenerate
from fedlp.allocation.search.variation import Vocabulary, crossover, mutate, random_expression
from fedlp.apps.model_allocator import Allocator
from fedlp.errors import AllocationError


class FunctionSpace:
    """Typed expression trees over the statistics of one model's layers."""

    def __init__(self, allocator: Allocator, ratios: Sequence[float]) -> None:
        self._allocator, self._ratios = allocator, ratios
        self._statistics = allocator.evidence.statistics
        self._words = Vocabulary.of(self._statistics)

    def draw(self, rng: np.random.Generator) -> Expression:
        """Return a random function."""
        return random_expression(rng, self._words)

    def mutate(self, candidate: Expression, rng: np.random.Generator) -> Expression:
        """Return a function that differs in one place."""
        return mutate(candidate, rng, self._words)

    def cross(self, first: Expression, second: Expression, rng: np.random.Generator) -> Expression:
        """Return a function with a part of the other."""
        return crossover(first, second, rng)

    def plans(self, candidate: Expression) -> Sequence[Plan] | None:
        """Return the plan at each ratio; None if the function gives all layers one value."""
        if is_degenerate(candidate, self._statistics):
            return None
        shape = evaluate(candidate, self._statistics)
        return [
            self._allocator.by_shape(shape, candidate.amplitude_at(ratio), self._allocator.limit(ratio))
            for ratio in self._ratios
        ]

    def describe(self, candidate: Expression) -> str:
        """Return the function as text."""
        return f"{candidate} * {candidate.amplitude:g} S^{candidate.power:g}"


class ChainSpace:
    """DSA's published chains, with its published amplitude."""

    def __init__(self, allocator: Allocator, ratios: Sequence[float]) -> None:
        self._allocator, self._limits = allocator, [allocator.limit(ratio) for ratio in ratios]
        self._elements = allocator.evidence.wanda

    def draw(self, rng: np.random.Generator) -> dsa.Chain:
        """Return a random chain."""
        return dsa.random_chain(rng)

    def mutate(self, candidate: dsa.Chain, rng: np.random.Generator) -> dsa.Chain:
        """Return a chain with one stage drawn anew."""
        return dsa.mutate_chain(candidate, rng)

    def cross(self, first: dsa.Chain, second: dsa.Chain, rng: np.random.Generator) -> dsa.Chain:
        """Return a chain with stages of both."""
        return dsa.cross_chains(first, second, rng)

    def plans(self, candidate: dsa.Chain) -> Sequence[Plan] | None:
        """Return the plan at each ratio; None if the chain fails on these layers or scores them alike."""
        try:
            shape = dsa.chain_shape(candidate, self._elements)
        except AllocationError:
            return None
        return [self._allocator.by_shape(shape, dsa.AMPLITUDE, limit) for limit in self._limits]

    def describe(self, candidate: dsa.Chain) -> str:
        """Return the chain in its authors' notation."""
        return str(candidate)
