"""The search on spaces whose best candidate is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from fedlp.allocation.search.evolution import Plan, Settings, Trial, VectorSpace, best_trial, search

TARGET = np.array([3, 9, 1, 7])


class Counts:
    """Four counts in 0..9; odd first ones are degenerate."""

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        return tuple(rng.integers(0, 10, 4).tolist())

    def mutate(self, candidate: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
        values = list(candidate)
        values[rng.integers(4)] = int(rng.integers(0, 10))
        return tuple(values)

    def cross(self, first: tuple[int, ...], second: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
        return tuple(np.where(rng.random(4) < 0.5, first, second).tolist())

    def plans(self, candidate: tuple[int, ...]) -> Sequence[Plan] | None:
        return None if candidate[3] == 0 else [dict(zip("abcd", candidate, strict=True))]

    def describe(self, candidate: tuple[int, ...]) -> str:
        return str(candidate)


class Fitness:
    """Distance from the target; on a part of the data only of the first two."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, candidates: Sequence[Sequence[Plan]], full: bool) -> list[float]:
        self.calls.append((len(candidates), full))
        used = 4 if full else 2
        return [float(np.abs(np.array(list(plans[0].values())) - TARGET)[:used].sum()) for plans in candidates]


def run(evolves: bool, seed: int, evaluations: int = 150) -> tuple[list[Trial[tuple[int, ...]]], Fitness]:
    fitness = Fitness()
    rng = np.random.default_rng(seed)
    return search(Counts(), fitness, Settings(evaluations, 20, evolves), rng), fitness


def test_no_candidate_is_measured_twice_and_the_promising_quarter_on_everything() -> None:
    trials, fitness = run(True, 0)
    assert len(trials) == 150
    assert len({trial.text for trial in trials}) == 150
    assert all(trial.candidate[3] for trial in trials)
    partial, full = (sum(count for count, kind in fitness.calls if kind is wanted) for wanted in (False, True))
    assert (partial, full) == (150, 7 * 5 + 3)
    assert sum(not math.isnan(trial.full) for trial in trials) == full


def test_the_same_seed_gives_the_same_search() -> None:
    assert [trial.text for trial in run(True, 3)[0]] == [trial.text for trial in run(True, 3)[0]]
    assert [trial.text for trial in run(True, 3)[0]] != [trial.text for trial in run(True, 4)[0]]


def test_evolution_beats_random_search_at_equal_evaluations() -> None:
    evolved = np.mean([best_trial(run(True, seed)[0]).full for seed in range(8)])
    random = np.mean([best_trial(run(False, seed)[0]).full for seed in range(8)])
    assert evolved < random


def test_an_exhausted_space_ends_the_search() -> None:
    class One(Counts):
        def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
            return (1, 2, 3, 4)

        def mutate(self, candidate: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
            return candidate

    trials = search(One(), Fitness(), Settings(10, 5, True), np.random.default_rng(0))
    assert [trial.text for trial in trials] == ["(1, 2, 3, 4)"]


def test_the_first_candidates_are_tried_first_and_vectors_move_around_the_start() -> None:
    start = {"a": 0.2, "b": 0.4, "c": 0.6, "d": 0.3}
    space = VectorSpace(start, lambda z: [{name: round(10 * value) for name, value in z.items()}])
    trials = search(space, Fitness(), Settings(40, 10, True), np.random.default_rng(0), first=[tuple(start.values())])
    assert trials[0].candidate == pytest.approx((0.2, 0.4, 0.6, 0.3))
    assert all(np.abs(np.array(trial.candidate) - list(start.values())).max() < 0.8 for trial in trials)
