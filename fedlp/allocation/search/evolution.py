"""Search over allocation candidates: evolution and random search at equal evaluations.

DSA (Li et al., NeurIPS 2024) evolves allocation functions. Here a candidate counts once, even if many functions give
its sparsities; degenerate ones are rejected before an evaluation; and only candidates that are promising on a
part of the data are measured on all of it (successive halving). The same seed gives the same search, for any number of
workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

T = TypeVar("T")
Plan = Mapping[str, int]  # units kept of each layer
Fitness = Callable[[Sequence[Sequence[Plan]], bool], list[float]]  # of each candidate's plans; all data or a part

_ATTEMPTS = 60  # proposals per candidate that is wanted, until a space counts as exhausted
_TOURNAMENT = 3
_PROMISING = 4  # one in so many is measured on all the data


class Space(Protocol[T]):
    """Protocol of a search space."""

    def draw(self, rng: np.random.Generator) -> T:
        """Return a random candidate."""

    def mutate(self, candidate: T, rng: np.random.Generator) -> T:
        """Return a candidate that differs slightly."""

    def cross(self, first: T, second: T, rng: np.random.Generator) -> T:
        """Return a candidate that combines both."""

    def plans(self, candidate: T) -> Sequence[Plan] | None:
        """Return the plan at each budget, or None if the candidate is degenerate."""

    def describe(self, candidate: T) -> str:
        """Return the candidate as text."""


@dataclass(frozen=True)
class Trial(Generic[T]):
    """One candidate and its fitness, the lower the better: on all the data, or nan if a part was enough."""

    candidate: T
    text: str
    plans: Sequence[Plan]
    partial: float
    full: float


@dataclass(frozen=True, slots=True)
class Settings:
    """Length and method of a search.

    Attributes
    ----------
    evaluations : int
        Distinct candidates.
    population : int
        Candidates per generation, and parents that survive.
    evolves : bool
        Breed from the best, or draw all at random.
    """

    evaluations: int
    population: int
    evolves: bool


def search(
    space: Space[T],
    fitness: Fitness,
    settings: Settings,
    rng: np.random.Generator,
    observe: Callable[[Trial[T]], None] = lambda _: None,
    first: Sequence[T] = (),
) -> list[Trial[T]]:
    """Return all trials in order; fewer than requested if the space is exhausted.

    Parameters
    ----------
    fitness : callable
        Gives the fitness of many candidates at once; it may run them in parallel.
    observe : callable
        Called with each trial.
    first : sequence of candidates
        Tried before any others.
    """
    trials: list[Trial[T]] = []
    seen: set[tuple[tuple[int, ...], ...]] = set()
    parents: list[Trial[T]] = []
    waiting = list(first)
    while len(trials) < settings.evaluations:
        wanted = min(settings.population, settings.evaluations - len(trials))
        batch = _propose(space, parents if settings.evolves else [], seen, waiting, wanted, rng)
        if not batch:
            break
        for trial in _measure(space, batch, fitness):
            trials.append(trial)
            observe(trial)
        ranked = sorted((trial for trial in trials if not np.isnan(trial.full)), key=lambda trial: trial.full)
        parents = ranked[: settings.population]
    return trials


def best_trial(trials: Sequence[Trial[T]]) -> Trial[T]:
    """Return the trial of the least fitness on all the data."""
    return min((trial for trial in trials if not np.isnan(trial.full)), key=lambda trial: trial.full)


def _propose(
    space: Space[T],
    parents: Sequence[Trial[T]],
    seen: set[tuple[tuple[int, ...], ...]],
    waiting: list[T],
    wanted: int,
    rng: np.random.Generator,
) -> list[tuple[T, Sequence[Plan]]]:
    """Return new candidates with their plans; none prunes like an earlier one."""
    batch: list[tuple[T, Sequence[Plan]]] = []
    for _ in range(_ATTEMPTS * wanted):
        if len(batch) == wanted:
            break
        candidate = waiting.pop(0) if waiting else _breed(space, parents, rng)
        plans = space.plans(candidate)
        if plans is None:
            continue
        signature = tuple(tuple(plan[name] for name in sorted(plan)) for plan in plans)
        if signature not in seen:
            seen.add(signature)
            batch.append((candidate, plans))
    return batch


def _breed(space: Space[T], parents: Sequence[Trial[T]], rng: np.random.Generator) -> T:
    if len(parents) < 2 or rng.random() < 0.1:  # fresh blood
        return space.draw(rng)
    mother, father = (_tournament(parents, rng) for _ in range(2))
    child = space.cross(mother, father, rng) if rng.random() < 0.5 else mother
    return space.mutate(child, rng) if child is mother or rng.random() < 0.5 else child


def _tournament(parents: Sequence[Trial[T]], rng: np.random.Generator) -> T:
    """Return the best of a few random parents, which are sorted."""
    return parents[int(rng.integers(len(parents), size=_TOURNAMENT).min())].candidate


def _measure(space: Space[T], batch: Sequence[tuple[T, Sequence[Plan]]], fitness: Fitness) -> list[Trial[T]]:
    """Return trials: all on a part of the data, the better quarter on all of it."""
    partial = fitness([plans for _, plans in batch], False)
    better = sorted(range(len(batch)), key=lambda index: partial[index])[: -(-len(batch) // _PROMISING)]
    full = dict(zip(better, fitness([batch[index][1] for index in better], True), strict=True))
    return [
        Trial(candidate, space.describe(candidate), plans, partial[index], full.get(index, float("nan")))
        for index, (candidate, plans) in enumerate(batch)
    ]


class VectorSpace:
    """Direct sparsities, one number per layer, around a hand-written rule's: the baseline of functions.

    Parameters
    ----------
    start : mapping from layer name to float
        Sparsities of the hand-written rule.
    solve : callable
        Gives the plan at each budget for a shape over layers, or None.
    scale : float
        Standard deviation of the steps.
    """

    def __init__(
        self,
        start: Mapping[str, float],
        solve: Callable[[Mapping[str, float]], Sequence[Plan] | None],
        scale: float = 0.08,
    ) -> None:
        self._names, self._start = tuple(start), np.array(list(start.values()))
        self._solve, self._scale = solve, scale

    def draw(self, rng: np.random.Generator) -> tuple[float, ...]:
        """Return the start with every layer moved."""
        return tuple((self._start + rng.normal(0.0, self._scale, len(self._start))).tolist())

    def mutate(self, candidate: tuple[float, ...], rng: np.random.Generator) -> tuple[float, ...]:
        """Move about two layers."""
        moved = rng.random(len(candidate)) < 2.0 / len(candidate)
        moved[rng.integers(len(candidate))] = True
        steps = rng.normal(0.0, self._scale, len(candidate)) * moved
        return tuple((np.array(candidate) + steps).tolist())

    def cross(self, first: tuple[float, ...], second: tuple[float, ...], rng: np.random.Generator) -> tuple[float, ...]:
        """Take every layer from one of the two."""
        takes = rng.random(len(first)) < 0.5
        return tuple(np.where(takes, first, second).tolist())

    def plans(self, candidate: tuple[float, ...]) -> Sequence[Plan] | None:
        """Return the plan at each budget."""
        return self._solve(dict(zip(self._names, candidate, strict=True)))

    def describe(self, candidate: tuple[float, ...]) -> str:
        """Return the numbers."""
        return " ".join(f"{value:.4f}" for value in candidate)
