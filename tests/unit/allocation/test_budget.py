"""Budgets are met exactly before rounding and within one unit after, whatever the rule."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise, product

import numpy as np
import pytest

from fedlp.allocation.budget.solve import Cost, round_units, solve_budget
from fedlp.allocation.evidence import Evidence
from fedlp.allocation.rules.depth_line import DepthLine
from fedlp.allocation.rules.dp import allocate_by_curves
from fedlp.allocation.rules.flap import allocate_pooled
from fedlp.allocation.rules.log_depth import LogDepth
from fedlp.allocation.rules.uniform import Uniform
from fedlp.errors import AllocationError
from fedlp.types import PrunableLayer


def make_problem(seed: int) -> tuple[list[PrunableLayer], Cost, np.random.Generator]:
    """Return random layers and a cost in which neighbours multiply, as in a chain of convolutions."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 12))
    units = rng.integers(2, 40, count)
    layers = [
        PrunableLayer(f"l{i}", int(n), 1, int(10 * n), (), (f"r{i}",), i / (count - 1)) for i, n in enumerate(units)
    ]
    own, pair = rng.uniform(1, 9, count), rng.uniform(0, 2, count - 1)

    def cost(kept: Mapping[str, float]) -> float:
        values = np.array([kept[layer.name] for layer in layers])
        return float(100 + own @ values + pair @ (values[1:] * values[:-1]))

    return layers, cost, rng


def bounds(layers: list[PrunableLayer], cost: Cost) -> tuple[float, float]:
    return cost({layer.name: 1 for layer in layers}), cost({layer.name: layer.num_units for layer in layers})


@pytest.mark.parametrize("seed", range(40))
def test_the_budget_is_met_exactly_and_within_one_unit_after_rounding(seed: int) -> None:
    layers, cost, rng = make_problem(seed)
    least, most = bounds(layers, cost)
    limit = least + float(rng.uniform(0.02, 0.98)) * (most - least)
    shape = {layer.name: float(rng.normal()) for layer in layers}
    sparsity = solve_budget(layers, shape, 0.3, cost, limit)
    wanted = {layer.name: (1 - sparsity[layer.name]) * layer.num_units for layer in layers}
    assert all(0 <= value < 1 for value in sparsity.values())
    assert cost(wanted) == pytest.approx(limit, rel=1e-9)
    kept = round_units(layers, sparsity, cost, limit)
    assert cost(kept) <= limit
    assert all(1 <= kept[layer.name] <= layer.num_units for layer in layers)
    for layer in layers:
        if kept[layer.name] < layer.num_units:
            assert cost({**kept, layer.name: kept[layer.name] + 1}) > limit


@pytest.mark.parametrize("seed", range(20))
def test_smaller_budgets_nest_inside_larger_ones(seed: int) -> None:
    layers, cost, rng = make_problem(seed)
    least, most = bounds(layers, cost)
    shape = {layer.name: float(rng.normal()) for layer in layers}
    solved = [solve_budget(layers, shape, 0.2, cost, least + f * (most - least)) for f in (0.2, 0.5, 0.8)]
    for small, large in pairwise(solved):
        assert all(small[name] >= large[name] - 1e-12 for name in small)


@pytest.mark.parametrize("seed", range(20))
def test_every_rule_ends_within_the_budget_and_wastes_less_than_a_unit(seed: int) -> None:
    layers, cost, rng = make_problem(seed)
    least, most = bounds(layers, cost)
    limit = least + 0.5 * (most - least)
    curves = {layer.name: np.cumsum(rng.uniform(0, 1, layer.num_units - 1)).tolist() for layer in layers}
    scores = {layer.name: rng.uniform(size=layer.num_units) for layer in layers}
    bare = Evidence(layers, 0.5)
    found = {str(rule): rule(layers, bare, cost, limit) for rule in (Uniform(), DepthLine(), LogDepth())}
    found["dp"] = allocate_by_curves(layers, curves, cost, limit)
    found["flap"] = allocate_pooled(layers, scores, cost, limit)
    for kept in found.values():
        assert cost(kept) <= limit
        for layer in layers:
            assert 1 <= kept[layer.name] <= layer.num_units
            if kept[layer.name] < layer.num_units:
                assert cost({**kept, layer.name: kept[layer.name] + 1}) > limit


def test_curves_are_allocated_at_the_least_total_loss() -> None:
    """Convex losses and equal prices: the greedy choice is the optimum, found here by trying all."""
    layers = [PrunableLayer(name, 5, 1, 50, (), (name,), 0.0) for name in "ab"]
    curves = {"a": [0.1, 0.3, 0.7, 2.0], "b": [0.2, 0.5, 1.5, 3.0]}
    cost = lambda kept: sum(kept.values())  # noqa: E731
    for limit in range(2, 10):
        kept = allocate_by_curves(layers, curves, cost, limit)
        loss = lambda k: sum(([0.0, *curves[n]])[5 - k[n]] for n in "ab")  # noqa: E731
        choices = [{"a": a, "b": b} for a in range(1, 6) for b in range(1, 6) if a + b <= limit]
        assert loss(kept) == pytest.approx(min(map(loss, choices)))


@pytest.mark.parametrize("seed", range(12))
def test_of_two_limits_neither_is_met_at_the_expense_of_all_losses(seed: int) -> None:
    """What is bought is within one unit of the least loss that there is, found by trying all."""
    rng = np.random.default_rng(seed)
    layers = [PrunableLayer(name, 12, 1, 120, (), (name,), 0.0) for name in "abc"]
    curves = {x.name: np.cumsum(np.sort(rng.exponential(size=11))).tolist() for x in layers}
    memory, time = np.array([1.0, 4.0, 16.0]), np.array([16.0, 4.0, 1.0])  # what is cheap for one is dear for the other
    shares = rng.uniform(0.3, 0.7, 2)

    def load(kept: Mapping[str, float]) -> float:
        units = np.array([kept[name] for name in "abc"])
        return max(memory @ units / (shares[0] * 12 * 21), time @ units / (shares[1] * 12 * 21))

    def loss(kept: Mapping[str, int]) -> float:
        return sum([0.0, *curves[name]][12 - kept[name]] for name in "abc")

    kept = allocate_by_curves(layers, curves, load, 1.0)
    assert load(kept) <= 1.0
    choices = [dict(zip("abc", units, strict=True)) for units in product(range(1, 13), repeat=3)]
    least = min(loss(choice) for choice in choices if load(choice) <= 1.0)
    assert loss(kept) <= least + max(np.diff([0.0, *curves[name]])[12 - kept[name]] for name in "abc" if kept[name] > 1)


def test_a_cost_that_the_first_units_do_not_change_is_met() -> None:
    layers = [PrunableLayer(name, 5, 1, 50, (), (name,), 0.0) for name in "ab"]
    curves = {name: [1.0, 2.0, 3.0, 4.0] for name in "ab"}
    kept = allocate_by_curves(layers, curves, lambda kept: max(6.0, sum(kept.values())) + max(0.0, kept["a"] - 3), 6.0)
    assert sum(kept.values()) == 6
    assert kept["a"] <= 3


def test_log_depth_rises_as_slimgpt_published_it() -> None:
    layers = [PrunableLayer(f"l{i}", 1000, 1, 1000, (), (f"r{i}",), i / 31) for i in range(32)]
    for sparsity, first, last in ((0.2004, 0.0625, 0.25), (0.5157, 0.125, 0.65625)):
        kept = LogDepth()(layers, Evidence(layers, sparsity), lambda k: sum(k.values()), (1 - sparsity) * 32_000)
        assert 1 - kept["l0"] / 1000 == pytest.approx(first, abs=0.02)
        assert 1 - kept["l31"] / 1000 == pytest.approx(last, abs=0.02)


def test_uniform_is_flat_and_one_layer_has_no_depth() -> None:
    layers = [PrunableLayer(f"l{i}", 1000, 1, 1000, (), (f"r{i}",), i / 3) for i in range(4)]
    cost = lambda kept: sum(kept.values())  # noqa: E731
    assert set(Uniform()(layers, Evidence(layers, 0.4), cost, 2400).values()) == {600}
    assert LogDepth()(layers[:1], Evidence(layers[:1], 0.4), cost, 600) == {"l0": 600}


def test_what_cannot_be_met_says_what_can() -> None:
    layers, cost, _ = make_problem(2)
    least, _ = bounds(layers, cost)
    with pytest.raises(AllocationError, match="out of reach"):
        solve_budget(layers, dict.fromkeys((x.name for x in layers), 0.0), 0.0, cost, least - 1)
    with pytest.raises(AllocationError, match=r"layer l0: its score is nan"):
        solve_budget(layers, {layer.name: float("nan") for layer in layers}, 1.0, cost, least + 1)
