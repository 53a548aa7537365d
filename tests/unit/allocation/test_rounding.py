"""Multiples that hardware may like: kept where bounds and limits leave one; limits hold, and nothing more fits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from fedlp.allocation.budget.constraints import round_client
from fedlp.allocation.budget.costs import make_costs
from fedlp.errors import AllocationError
from fedlp.types import Budget, PrunableLayer
from tests.unit.allocation.test_constraints import FRACTIONS, Problem, make_problem

MULTIPLES = (2, 4, 8)


def fits(problem: Problem, kept: Mapping[str, int], budget: Budget) -> bool:
    cost = problem.cost(dict(kept))
    return all(cost[name] <= getattr(budget, name) * (1 + 1e-12) for name in problem.limited)


def next_count(count: int, units: int, multiple: int) -> int:
    return min(units, (count // multiple + 1) * multiple)


def refill_naively(problem: Problem, sparsity: dict[str, float], budget: Budget, multiple: int) -> dict[str, int]:
    """Return what round_client does, one client, one layer and one step at a time."""
    layers = sorted(problem.layers, key=lambda layer: layer.name)
    units = {layer.name: layer.num_units for layer in layers}
    wanted = {name: (1 - sparsity[name]) * n for name, n in units.items()}
    steps = {name: multiple if n >= 2 * multiple else 1 for name, n in units.items()}
    kept = {name: max(1, int(count)) for name, count in wanted.items()}
    for name, count in kept.items():
        if count >= steps[name] and count < units[name]:
            kept[name] = count // steps[name] * steps[name]
    prices = {layer.name: layer.num_params / layer.num_units for layer in layers}
    for _ in range(2):  # then again, in single units where no multiple was reached
        lacking = {n: next_count(kept[n], units[n], steps[n]) - kept[n] - round(wanted[n] - kept[n], 9) for n in kept}
        order = sorted(kept, key=lambda name: (kept[name] % steps[name] == 0, lacking[name]))
        growing = {name for name in kept if kept[name] < units[name]}
        while growing:
            for name in [name for name in order if name in growing]:
                more = {**kept, name: next_count(kept[name], units[name], steps[name])}
                if fits(problem, more, budget):
                    kept = more
                else:
                    growing.remove(name)
            growing = {name for name in growing if kept[name] < units[name]}
            order = sorted(kept, key=prices.__getitem__)
        steps = {n: 1 if kept[n] % step and kept[n] < units[n] else step for n, step in steps.items()}
    return {layer.name: kept[layer.name] for layer in problem.layers}


@pytest.mark.parametrize("multiple", [1, *MULTIPLES])
@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_naive_one_step_at_a_time(seed: int, multiple: int) -> None:
    problem = make_problem(seed)
    for fraction in FRACTIONS:
        budget = problem.budget(fraction)
        sparsity = problem.solve(budget)
        kept = round_client(problem.layers, sparsity, problem.costs, budget, multiple=multiple)
        assert kept == refill_naively(problem, sparsity, budget, multiple)
        if multiple == 1:
            assert kept == round_client(problem.layers, sparsity, problem.costs, budget)


@pytest.mark.parametrize("multiple", MULTIPLES)
@pytest.mark.parametrize("first", range(0, 40, 20))
def test_all_limits_hold_counts_are_multiples_and_nothing_more_fits(first: int, multiple: int) -> None:
    for seed in range(first, first + 20):
        problem = make_problem(seed)
        for fraction in FRACTIONS:
            budget = problem.budget(fraction)
            sparsity = problem.solve(budget)
            kept = round_client(problem.layers, sparsity, problem.costs, budget, multiple=multiple)
            assert fits(problem, kept, budget), seed
            for layer in problem.layers:
                count, units = kept[layer.name], layer.num_units
                assert 1 <= count <= units
                is_regular = units >= 2 * multiple and (count % multiple == 0 or count == units)
                step = multiple if is_regular else 1
                if count < units:
                    assert not fits(problem, {**kept, layer.name: next_count(count, units, step)}, budget), seed
                if units >= 2 * multiple and not is_regular:  # a limit leaves no multiple
                    assert count < multiple, seed


def test_without_a_limit_all_units_stay() -> None:
    problem = make_problem(0)
    nothing = dict.fromkeys(problem.shape, 0.5)
    kept = round_client(problem.layers, nothing, problem.costs, None, multiple=4)
    assert kept == {layer.name: layer.num_units for layer in problem.layers}


def one_layer(units: int) -> Problem:
    layer = PrunableLayer("a", units, 1, units, (), ("r",), 0.0)
    costs = make_costs([layer], {("a",): 1.0}, {("a",): 1.0}, {("a",): 1.0}, 1, "sgd")
    return Problem([layer], costs, {"a": 0.0}, ["params"], np.random.default_rng(0))


# units, budget of params (one a unit), lowest and highest sparsity -> units kept in multiples of 8
CASES = [
    (64, 63.0, (0.0, 1.0), 56),
    (64, 64.0, (0.0, 1.0), 64),
    (20, 20.0, (0.0, 1.0), 20),  # all units are as good as a multiple
    (20, 19.0, (0.0, 1.0), 16),
    (15, 14.0, (0.0, 1.0), 14),  # fewer than two multiples
    (64, 7.0, (0.0, 1.0), 7),  # the limit leaves no multiple
    (64, 23.0, (0.0, 0.7), 23),  # 20 must stay and 24 are too many
    (64, 60.0, (0.75, 0.8), 16),
    (64, 60.0, (0.7, 0.73), 19),  # 18 or 19
    (20, 20.0, (0.1, 0.2), 16),
    (20, 20.0, (0.0, 0.1), 20),
    (20, 19.0, (0.0, 0.1), 19),
]


@pytest.mark.parametrize(("units", "params", "bounds", "expected"), CASES)
def test_where_bounds_or_limits_leave_no_multiple_any_count_will_do(
    units: int, params: float, bounds: tuple[float, float], expected: int
) -> None:
    problem, budget = one_layer(units), Budget(params=params)
    wanted = {"a": 1 - min(params, units * (1 - bounds[0])) / units}
    kept = round_client(problem.layers, wanted, problem.costs, budget, bounds={"a": bounds}, multiple=8)
    assert kept == {"a": expected}


def test_a_layer_below_its_first_multiple_gets_what_others_give_up() -> None:
    layers = [PrunableLayer(name, n, 1, n, (), (name,), 0.0) for name, n in (("a", 16), ("b", 64))]
    costs = make_costs(layers, {("a",): 1.0, ("b",): 1.0}, {}, {}, 1, "sgd")
    sparsity = {"a": 1 - 5 / 16, "b": 1 - 20 / 64}
    assert round_client(layers, sparsity, costs, Budget(params=25.0)) == {"a": 5, "b": 20}
    assert round_client(layers, sparsity, costs, Budget(params=25.0), multiple=8) == {"a": 8, "b": 16}
    assert round_client(layers, sparsity, costs, Budget(params=23.0), multiple=8) == {"a": 7, "b": 16}


@pytest.mark.parametrize("multiple", [0, -8])
def test_a_multiple_below_one_is_said(multiple: int) -> None:
    problem = make_problem(3)
    with pytest.raises(AllocationError, match=f"^units are to be kept in multiples of {multiple}; choose a whole"):
        round_client(problem.layers, problem.shape, problem.costs, None, multiple=multiple)
