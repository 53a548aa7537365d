"""Every limit of a client holds, one is met exactly, nothing more fits, and small budgets nest inside large."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np
import pytest

from fedlp.allocation.budget.constraints import round_client
from fedlp.allocation.budget.costs import COSTS, CostModel, LatencyTable, make_costs
from fedlp.allocation.budget.solve import solve_budget
from fedlp.errors import AllocationError
from fedlp.types import Budget, PrunableLayer

FRACTIONS = (0.03, 0.25, 0.5, 0.9)
LIMITS = tuple(item.name for item in fields(Budget))


@dataclass
class Problem:
    layers: list[PrunableLayer]
    costs: CostModel
    shape: dict[str, float]
    limited: list[str]
    rng: np.random.Generator

    def cost(self, kept: dict[str, float] | dict[str, int]) -> dict[str, float]:
        """Return every cost, one client and one layer at a time: the naive twin of the vectorised one."""
        values = {}
        for name, coefficients in zip(COSTS, self.costs.coefficients, strict=True):
            total = 0.0
            for coefficient, row in zip(coefficients, self.costs.factors, strict=True):
                term = float(coefficient)
                for index in row[row < len(self.layers)]:
                    term *= kept[self.layers[index].name]
                total += term
            values[name] = total
        assert self.costs.latency is not None
        return {**values, "latency_s": self.costs.latency.time(values["macs"])}

    def budget(self, fraction: float) -> Budget:
        """Return limits that lie so far between what one unit of every layer costs and what all cost."""
        least = self.cost({layer.name: 1 for layer in self.layers})
        most = self.cost({layer.name: layer.num_units for layer in self.layers})
        return Budget(**{name: least[name] + fraction * (most[name] - least[name]) for name in self.limited})

    def solve(self, budget: Budget, shape: dict[str, float] | None = None, amplitude: float = 0.3) -> dict[str, float]:
        """Return the sparsities at which the tightest limit is met exactly, none where nothing must go."""
        limits = self.costs.limits(budget)

        def load(kept: Mapping[str, float]) -> float:
            row = np.array([[kept[name] for name in self.costs.layers]], dtype=np.float64)
            return float((self.costs.evaluate(row)[0] / limits).max())

        if load({layer.name: layer.num_units for layer in self.layers}) <= 1.0:
            return dict.fromkeys(self.costs.layers, 0.0)
        return solve_budget(self.layers, self.shape if shape is None else shape, amplitude, load, 1.0)

    def units(self, sparsity: dict[str, float]) -> dict[str, float]:
        return {layer.name: (1 - sparsity[layer.name]) * layer.num_units for layer in self.layers}


def make_problem(seed: int) -> Problem:
    """Return random layers whose costs multiply neighbours and, now and then, a layer with itself or two others."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 12))
    names = [f"l{i}" for i in rng.permutation(count)]
    layers = [
        PrunableLayer(name, int(n), 1, int(n * rng.integers(1, 99)), (), (name,), i / (count - 1))
        for i, (name, n) in enumerate(zip(names, rng.integers(1, 40, count), strict=True))
    ]
    layers[0] = replace(layers[0], num_units=9)
    pairs = list(pairwise(sorted(names)))

    def terms(*keys: tuple[str, ...]) -> dict[tuple[str, ...], float]:
        return {key: float(rng.uniform(0.1, 9)) for key in keys}

    macs = terms((), *pairs, (names[0], names[0]), *([tuple(names[:3])] if count > 3 else []))
    table = LatencyTable((10.0, 200.0, 1000.0, 9000.0), tuple(rng.uniform(1, 9, 4)))
    costs = make_costs(
        layers,
        terms((), *((name,) for name in names), *pairs),
        macs,
        terms((), *((name,) for name in names)),
        batch_size=int(rng.integers(1, 64)),
        optimizer=("sgd", "momentum", "adam")[seed % 3],
        upload_overhead=100.0,
        latency=table,
    )
    limited = sorted(rng.choice(LIMITS, int(rng.integers(1, 6)), replace=False))
    return Problem(layers, costs, {name: float(rng.normal()) for name in names}, limited, rng)


@pytest.mark.parametrize("first", range(0, 300, 30))
def test_all_limits_hold_one_exactly_nothing_more_fits_and_small_budgets_nest(first: int) -> None:
    for seed in range(first, first + 30):
        problem = make_problem(seed)
        solved = []
        for fraction in FRACTIONS:
            budget = problem.budget(fraction)
            limits = {name: getattr(budget, name) for name in problem.limited}
            sparsity = problem.solve(budget)
            assert all(0 <= value < 1 for value in sparsity.values())
            cost = problem.cost(problem.units(sparsity))
            assert all(cost[name] <= limit * (1 + 1e-9) for name, limit in limits.items()), seed
            tightness = max(cost[name] / limit for name, limit in limits.items())
            assert tightness == pytest.approx(1, rel=1e-9) or set(sparsity.values()) == {0.0}, seed
            kept = round_client(problem.layers, sparsity, problem.costs, budget)
            cost = problem.cost(kept)
            assert all(cost[name] <= limit * (1 + 1e-12) for name, limit in limits.items()), seed
            for layer in problem.layers:
                assert 1 <= kept[layer.name] <= layer.num_units
                more = problem.cost({**kept, layer.name: kept[layer.name] + 1})
                full = kept[layer.name] == layer.num_units
                assert full or any(more[name] > limit * (1 - 1e-12) for name, limit in limits.items()), seed
            solved.append(sparsity)
        for small, large in pairwise(solved):
            assert all(small[name] >= large[name] for name in small), seed


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_layers_does_not_matter(seed: int) -> None:
    problem = make_problem(seed)
    order = problem.rng.permutation(len(problem.layers))
    layers = [problem.layers[i] for i in order]
    places = np.append(np.argsort(order), len(order))
    costs = CostModel(
        tuple(layer.name for layer in layers),
        places[problem.costs.factors],
        problem.costs.coefficients,
        problem.costs.latency,
    )
    budget = problem.budget(0.4)
    plain = problem.solve(budget)
    kept = round_client(problem.layers, plain, problem.costs, budget)
    assert round_client(layers, plain, costs, budget) == kept


@pytest.mark.parametrize("seed", range(20))
def test_a_higher_score_removes_no_less_and_a_solution_solves_itself(seed: int) -> None:
    problem = make_problem(seed)
    budget = problem.budget(0.4)
    solved = problem.solve(budget)
    for name in problem.shape:
        higher = problem.solve(budget, {**problem.shape, name: problem.shape[name] + 0.5})
        assert higher[name] >= solved[name] - 1e-12
    assert problem.solve(budget, solved, 1.0) == pytest.approx(solved, abs=1e-9)
    kept = round_client(problem.layers, solved, problem.costs, budget)
    whole = {layer.name: 1 - kept[layer.name] / layer.num_units for layer in problem.layers}
    assert round_client(problem.layers, whole, problem.costs, budget) == kept


def test_bounds_are_kept() -> None:
    problem = make_problem(4)
    bounds = {layer.name: (0.1, 0.6) for layer in problem.layers}
    reachable = problem.cost({layer.name: np.ceil(0.4 * layer.num_units) for layer in problem.layers})
    budget = Budget(params=reachable["params"] * 1.1)
    most = dict.fromkeys(bounds, 0.6)
    kept = round_client(problem.layers, most, problem.costs, budget, bounds=bounds)
    for layer in problem.layers:
        assert 0.4 * layer.num_units - 1e-9 <= kept[layer.name] <= max(1, 0.9 * layer.num_units)


def test_memory_is_weights_and_what_the_optimiser_keeps_and_a_batch_of_activations() -> None:
    layer = PrunableLayer("a", 10, 1, 50, (), ("r",), 0.0)
    for optimizer, copies in (("sgd", 2), ("momentum", 3), ("adam", 4)):
        costs = make_costs([layer], {("a",): 5.0}, {("a",): 7.0}, {("a",): 3.0}, 8, optimizer, upload_overhead=11.0)
        cost = dict(zip(COSTS, costs.evaluate(np.array([10.0])), strict=True))
        assert cost == {"params": 50, "macs": 70, "memory_bytes": 4 * copies * 50 + 8 * 30, "upload_bytes": 211}


def test_a_latency_table_never_falls_and_inverts() -> None:
    table = LatencyTable((1.0, 2.0, 4.0), (1.0, 0.5, 3.0))
    assert table.seconds == (1.0, 1.0, 3.0)
    assert [table.time(macs) for macs in (0.5, 1.5, 3.0, 8.0)] == [1.0, 1.0, 2.0, 6.0]
    assert [table.most_macs(seconds) for seconds in (0.9, 1.0, 2.0, 6.0)] == [0.0, 2.0, 3.0, 8.0]
    for macs, seconds in (((2.0, 1.0), (1.0, 1.0)), ((1.0,), (float("nan"),)), ((), ())):
        with pytest.raises(AllocationError, match="latency table"):
            LatencyTable(macs, seconds)


BAD = [
    (Budget(params=-5.0), "client 3: its budget has params=-5.0; a limit must be a finite number above 0"),
    (Budget(macs=float("nan")), "client 3: its budget has macs=nan; a limit must be"),
    (Budget(params=1e9, memory_bytes=1.0), "client 3: its budget of memory_bytes=1 is out of reach: with the fewest"),
    (Budget(latency_s=1e-3), "client 3: its budget of latency_s=0.001 is out of reach"),
]


@pytest.mark.parametrize(("budget", "message"), BAD, ids=[message for _, message in BAD])
def test_a_budget_that_cannot_be_met_names_client_and_limit(budget: Budget, message: str) -> None:
    problem = make_problem(7)
    with pytest.raises(AllocationError, match=f"^{message}") as caught:
        round_client(problem.layers, problem.shape, problem.costs, budget, client_id=3)
    assert "\n" not in str(caught.value)


def test_the_tightest_reachable_value_is_reachable() -> None:
    problem = make_problem(8)
    least = problem.cost({layer.name: 1 for layer in problem.layers})["params"]
    sparsity = {layer.name: 1 - 1 / layer.num_units for layer in problem.layers}
    with pytest.raises(AllocationError, match=f"it still is {least:,.10g}; choose at least that"):
        round_client(problem.layers, sparsity, problem.costs, Budget(params=0.9 * least))
    assert set(round_client(problem.layers, sparsity, problem.costs, Budget(params=least)).values()) == {1}


def test_what_is_never_cut_is_said_where_a_budget_cannot_be_met() -> None:
    layers = [PrunableLayer(name, 10, 1, 50, (), ("r",), 0.0) for name in "ab"]
    costs = make_costs(layers, {("a",): 5.0, ("b",): 5.0, (): 900.0}, {("a",): 7.0}, {}, 8, "sgd")
    line = (
        "client 0: its budget of params=500 is out of reach: with the fewest units in each of the 2 prunable layers it "
        "still is 910; choose at least that (91 % of the whole model's, of which parts that are never cut, such as "
        "embeddings, take 900)"
    )
    with pytest.raises(AllocationError, match=f"^{re.escape(line)}$"):
        round_client(layers, dict.fromkeys("ab", 0.5), costs, Budget(params=500.0))


def test_what_is_wrong_with_a_layer_is_said_in_one_line() -> None:
    problem = make_problem(9)
    name, budget = problem.layers[1].name, problem.budget(0.5)
    sparsity = problem.solve(budget)
    with pytest.raises(AllocationError, match=f"^client 2: layer {name}: its sparsity is nan; it must be finite"):
        round_client(problem.layers, {**sparsity, name: math.nan}, problem.costs, budget, client_id=2)
    empty = [replace(layer, num_units=0) if layer.name == name else layer for layer in problem.layers]
    with pytest.raises(AllocationError, match=f"^layer {name} has 0 units"):
        round_client(empty, sparsity, problem.costs, budget)
    with pytest.raises(AllocationError, match=r"^the costs are those of layers"):
        round_client(problem.layers[::-1], sparsity, problem.costs, budget)
    with pytest.raises(AllocationError, match="costs must rise"):
        make_costs(problem.layers, {(name,): -1.0}, {}, {}, 1, "sgd")
    without = replace(problem.costs, latency=None)
    with pytest.raises(AllocationError, match=r"client 0: its budget has latency_s=1\.0, but nothing was measured"):
        round_client(problem.layers, sparsity, without, Budget(latency_s=1.0))
