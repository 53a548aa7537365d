"""What secure aggregation needs: where clients return one index set, the server uses nothing but sums of theirs."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.federation.aggregation.coverage_average import coverage_average
from fedlp.federation.oneshot import messages as wire
from fedlp.federation.oneshot.server import ClientPool
from fedlp.federation.strategies.plan_policy import PlanPolicy
from fedlp.federation.strategies.policy import Answer
from fedlp.types import Assignment, ClientReport, Keep, SubModel

check = settings(deadline=None, derandomize=True, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
SHAPES = {"a": (7,), "b": (6, 5), "c": (4, 3, 2, 2)}


def others(values: list[Tensor], weights: list[int], rng: np.random.Generator) -> tuple[list[Tensor], list[int]]:
    """Return two other clients with the weighted sum and the total weight of these two."""
    total = sum(weights)
    first = int(rng.integers(1, total))
    one = torch.from_numpy(rng.standard_normal(values[0].shape))
    other = (weights[0] * values[0] + weights[1] * values[1] - first * one) / (total - first)
    return [one, other], [first, total - first]


def some(rng: np.random.Generator, size: int) -> Keep:
    return Keep.from_indices(np.sort(rng.choice(size, rng.integers(1, size + 1), replace=False)), size)


# ---- weights
@check
@given(seeds)
def test_an_average_over_one_index_set_is_a_function_of_two_sums(seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = {name: torch.from_numpy(rng.standard_normal(shape)) for name, shape in SHAPES.items()}
    groups = [{name: tuple(some(rng, size) for size in shape) for name, shape in SHAPES.items()} for _ in range(2)]
    clients = [(group, int(rng.integers(1, 30))) for group in (0, 0, 0, 1)]  # the last one has another budget
    updates = [
        ({n: torch.from_numpy(rng.standard_normal([k.count for k in ks])) for n, ks in groups[g].items()}, groups[g], w)
        for g, w in clients
    ]
    seed_of_pair = int(rng.integers(2**32))
    replaced: list[dict[str, Tensor]] = [{}, {}]
    weights = [updates[0][2], updates[1][2]]
    for name in params:
        pair = [updates[0][0][name], updates[1][0][name]]
        (replaced[0][name], replaced[1][name]), new = others(pair, weights, np.random.default_rng(seed_of_pair))
    changed = [(replaced[0], groups[0], new[0]), (replaced[1], groups[0], new[1]), *updates[2:]]
    before, after = coverage_average(params, updates), coverage_average(params, changed)
    for name, value in before[0].items():
        torch.testing.assert_close(after[0][name], value, rtol=1e-9, atol=1e-9)
    assert after[1] == before[1]


def test_with_index_sets_of_their_own_sums_do_not_suffice() -> None:
    params = {"a": torch.zeros(2, dtype=torch.float64)}
    apart = [({"a": torch.tensor([2.0 * (i + 1)]).double()}, {"a": (Keep(2, ((i, i + 1),)),)}, 1) for i in (0, 1)]
    alike = [({"a": torch.tensor([1.0, 2.0]).double()}, {}, 1)] * 2  # zero-filled, these sum up to the same
    assert coverage_average(params, apart)[0]["a"].tolist() == [2.0, 4.0]
    assert coverage_average(params, alike)[0]["a"].tolist() == [1.0, 2.0]


# ---- index sets
@lru_cache
def policy(*overrides: str) -> PlanPolicy:
    tiers = ("fleet=tiers", "fleet.fractions=[1.0,0.3]", "num_clients=6", "clients_per_round=6")
    found = assembly.make_plan(to_yaml(compose(["strategy=fedlp_plan", "model=fedlp_cnn", *tiers, *overrides]))).policy
    assert isinstance(found, PlanPolicy)
    return found


def returned(found: PlanPolicy, scores: dict[str, Tensor], client_id: int, examples: int) -> Answer:
    report = ClientReport(1, client_id, examples, {}, scores=scores)
    return Assignment(1, client_id, SubModel(), frozenset()), report


def random_scores(found: PlanPolicy, rng: np.random.Generator) -> dict[str, Tensor]:
    return {layer.name: torch.from_numpy(rng.random(layer.num_units)) for layer in found.context.submodels.layers}


@pytest.mark.parametrize("more", ["allocator=dp", "strategy.regrow=0.4", "pruner=random", "allocator=flap"])
def test_clients_of_one_budget_return_one_index_set_where_the_server_chooses(more: str) -> None:
    found = policy("strategy.unit_selection=server", more)
    memory = found.remember({}, 1, [returned(found, random_scores(found, np.random.default_rng(0)), 0, 5)])
    for server_round, past in ((1, {}), (2, memory)):
        for budget in set(found.context.budgets):
            members = [i for i, other in enumerate(found.context.budgets) if other == budget]
            assigned = [found.assign(server_round, client_id, past) for client_id in members]
            assert len(members) == 3
            assert assigned[0].returned or assigned[0].submodel.widths, "something is left out"
            assert all(replace(one, client_id=members[0]) == assigned[0] and not one.kept for one in assigned)


def test_clients_that_choose_return_sets_of_their_own() -> None:
    assert any(policy("strategy.unit_selection=client").assign(1, client_id, {}).kept for client_id in range(6))


# ---- statistics
@check
@given(seeds)
def test_pooled_scores_of_units_are_a_function_of_two_sums(seed: int) -> None:
    rng, found = np.random.default_rng(seed), policy("strategy.unit_selection=server")
    scores, weights = [random_scores(found, rng) for _ in range(2)], [3, 8]
    fixed = returned(found, random_scores(found, rng), 2, 7)
    changed: list[dict[str, Tensor]] = [{}, {}]
    for layer in found.context.submodels.layers:
        pair = [scores[0][layer.name], scores[1][layer.name]]
        (changed[0][layer.name], changed[1][layer.name]), new = others(pair, weights, np.random.default_rng(seed))
    before = found.remember({}, 1, [*(returned(found, scores[i], i, weights[i]) for i in (0, 1)), fixed])
    after = found.remember({}, 1, [*(returned(found, changed[i], i, new[i]) for i in (0, 1)), fixed])
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-9, atol=1e-9)


@check
@given(seeds)
def test_pooled_moments_are_sums(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [wire.Part("total", (5,)), wire.Part("gram", (4, 4), symmetric=True)]
    sent = [{part.name: torch.from_numpy(rng.standard_normal(part.num_sent)) for part in parts} for _ in range(3)]
    shift = {name: torch.from_numpy(rng.standard_normal(value.shape)) for name, value in sent[0].items()}
    changed = [{n: v + shift[n] for n, v in sent[0].items()}, {n: v - shift[n] for n, v in sent[1].items()}, sent[2]]

    def total(answers: list[dict[str, Tensor]], counts: list[int]) -> tuple[dict[str, Tensor], int]:
        pool = SimpleNamespace(answers=lambda *_: zip(answers, counts, strict=True), _secure=None)
        pool._add = partial(ClientPool._add, pool)
        sums, examples = ClientPool.total(pool, wire.Question(wire.MOMENTS), parts, None)  # type: ignore[arg-type]
        return sums, sum(examples)

    (before, count), (after, same) = total(sent, [3, 4, 5]), total(changed, [1, 6, 5])
    assert count == same
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-9, atol=1e-9)
