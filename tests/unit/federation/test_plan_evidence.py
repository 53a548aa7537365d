"""What the server pools of clients' inputs is what one place with all of them would measure."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlp.allocation.evidence import Evidence
from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.errors import ConfigError
from fedlp.federation.client.input_norms import measure_input_norms
from fedlp.federation.strategies.plan_evidence import pool_input_norms, round_evidence
from fedlp.federation.strategies.plan_policy import PlanPolicy
from fedlp.federation.strategies.policy import Answer
from fedlp.federation.submodels import SubModels
from fedlp.models import state_tensors
from fedlp.pruning.tracing.widths import cut_model, slice_tensor, tensor_keeps
from fedlp.types import Assignment, ClientReport, InputNorms, Keep, PrunableLayer, SubModel

LAYERS = [
    PrunableLayer("a", 6, 1, 60, (), ("one",), 0.0),
    PrunableLayer("b", 4, 3, 90, (), ("two", "three"), 1.0),  # two reads 3 columns a unit, three 5
]
COLUMNS = {"one": 6, "two": 12, "three": 20}


def answered(client_id: int, widths: dict[str, Keep], norms: dict[str, InputNorms], examples: int = 10) -> Answer:
    report = ClientReport(1, client_id, examples, {}, widths, input_norms=norms)
    return Assignment(1, client_id, SubModel(widths=widths), frozenset()), report


def draw(seed: int, clients: int) -> tuple[list[Answer], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return clients of different widths, and per reader each column's mean square over all that hold it."""
    rng = np.random.default_rng(seed)
    answers: list[Answer] = []
    squares, counts = ({path: np.zeros(n) for path, n in COLUMNS.items()} for _ in range(2))
    for client in range(clients):
        widths, norms = {}, {}
        for layer in LAYERS:
            held = np.sort(rng.choice(layer.num_units, rng.integers(1, layer.num_units), replace=False))
            keep = Keep.from_indices(held, layer.num_units)
            if client:  # the first holds everything
                widths[layer.name] = keep
            for path in layer.readers:
                per_unit = COLUMNS[path] // layer.num_units
                columns = (keep if client else Keep.full(layer.num_units)).repeat(per_unit).indices()
                x = rng.normal(0, 10 ** rng.uniform(-2, 2), (int(rng.integers(1, 30)), len(columns)))
                norms[path] = InputNorms(torch.from_numpy(np.square(x).sum(axis=0)), len(x))
                squares[path][columns] += np.square(x).sum(axis=0)
                counts[path][columns] += len(x)
        answers.append(answered(client, widths, norms))
    return answers, squares, counts


@pytest.mark.parametrize("seed", range(10))
def test_pooled_over_clients_of_different_widths_is_central(seed: int) -> None:
    answers, squares, counts = draw(seed, 5)
    found = pool_input_norms(LAYERS, {}, answers)
    assert found.keys() == {f"norm.{path}" for path in COLUMNS}
    for path in COLUMNS:
        np.testing.assert_allclose(found[f"norm.{path}"].numpy(), squares[path] / counts[path], rtol=1e-12)


def test_a_column_that_nobody_measured_keeps_its_value_or_has_the_mean_of_the_others() -> None:
    half = {"a": Keep.first(3, 6)}
    norms = {"one": InputNorms(torch.tensor([2.0, 4.0, 6.0], dtype=torch.float64), 2)}
    first = pool_input_norms(LAYERS, {}, [answered(0, half, norms)])
    assert first["norm.one"].tolist() == [1, 2, 3, 2, 2, 2]
    later = pool_input_norms(LAYERS, {"norm.one": torch.arange(6.0).double()}, [answered(0, half, norms)])
    assert later["norm.one"].tolist() == [1, 2, 3, 3, 4, 5]
    assert pool_input_norms(LAYERS, first, [answered(0, half, {})]) == {}


# ---- a model
@lru_cache
def policy(*overrides: str) -> PlanPolicy:
    tiers = ("fleet=tiers", "fleet.fractions=[1.0,0.3]", "num_clients=6", "clients_per_round=6")
    found = assembly.make_plan(to_yaml(compose(["strategy=fedlp_plan", "model=fedlp_cnn", *tiers, *overrides]))).policy
    assert isinstance(found, PlanPolicy)
    return found


def batches(submodels: SubModels, seed: int, count: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn((count, *submodels.spec.input_shape), generator=rng) * (seed + 1)]


def test_norms_of_shards_pool_to_those_of_their_union_and_so_does_wandas_metric() -> None:
    submodels = policy().context.submodels
    model = submodels.spec.build(0).eval()
    paths = list(submodels.reader_columns)
    shards = [batches(submodels, seed, count) for seed, count in ((0, 3), (1, 8), (2, 1))]
    answers = [answered(i, {}, measure_input_norms(model, paths, shard)) for i, shard in enumerate(shards)]
    pooled = pool_input_norms(submodels.layers, {}, answers)
    union = measure_input_norms(model, paths, [batch for shard in shards for batch in shard])
    for path, norms in union.items():
        torch.testing.assert_close(pooled[f"norm.{path}"], norms.total / norms.count, rtol=1e-12, atol=0)
    params = dict(state_tensors(model))
    whole = {x.name: x.num_units for x in submodels.layers}
    in_a_round = round_evidence(submodels, whole, 0.5, pooled, params)
    weights = {
        x.name: [model.get_submodule(path).weight.detach().double().numpy() for path in x.readers]
        for x in submodels.layers
    }
    means = {x.name: [(union[p].total / union[p].count).numpy() for p in x.readers] for x in submodels.layers}
    central = Evidence(submodels.layers, 0.5, weights=lambda: weights, input_norms=lambda: means)
    for name, values in central.wanda.items():
        np.testing.assert_allclose(in_a_round.wanda[name], values, rtol=1e-9)


def test_a_narrow_client_measures_the_columns_that_it_holds() -> None:
    """Of units whose producers it holds alone the same values come: those of the first prunable layer."""
    submodels = policy().context.submodels
    model, layer = submodels.spec.build(0).eval(), submodels.layers[0]
    keep = Keep.from_indices(np.arange(1, layer.num_units, 2), layer.num_units)
    narrow = cut_model(model, submodels.widths, {layer.name: keep}).eval()
    for name, tensor in state_tensors(narrow).items():
        whole = state_tensors(model)[name]
        tensor.copy_(slice_tensor(whole, tensor_keeps(submodels.widths, name, whole.shape, {layer.name: keep})))
    data, path = batches(submodels, 0, 4), layer.readers[0]
    mine, all_of_them = (measure_input_norms(m, [path], data)[path] for m in (narrow, model))
    columns = keep.repeat(len(all_of_them.total) // layer.num_units).indices()
    assert mine.count == all_of_them.count
    torch.testing.assert_close(mine.total, all_of_them.total[columns], rtol=1e-5, atol=1e-9)


# ---- rules in a round
@pytest.mark.parametrize("rule", ["owl", "dlp", "dsa"])
def test_rules_of_wandas_metric_ask_for_norms_and_divide_budgets_by_them(rule: str) -> None:
    found = policy(f"allocator={rule}")
    assert found.assign(1, 0, {}).evidence == {"unit_scores", "input_norms"}
    assert not found.assign(2, 0, {}).evidence, "fresh ones come every refresh_every rounds"
    submodels = found.context.submodels
    params = dict(state_tensors(submodels.spec.build(0)))
    norms = measure_input_norms(
        submodels.spec.build(0).eval(), list(submodels.reader_columns), batches(submodels, 0, 4)
    )
    memory = found.remember({}, 1, [answered(0, {}, norms)])
    small = next(i for i, budget in enumerate(found.context.budgets) if budget != max_budget(found))
    before, after = (found.counts(9, small, past, params)[0] for past in ({}, memory))
    uniform = policy("allocator=uniform").counts(9, small, {}, params)[0]
    assert before == uniform, "nothing is known yet"
    assert after != uniform
    budget = found.context.budgets[small]
    assert budget is not None
    for held in (before, after):
        row = np.array([[held[name] for name in found.costs.layers]], dtype=float)
        assert found.costs.evaluate(row)[0, 0] <= budget.params * (1 + 1e-9)


def max_budget(found: PlanPolicy) -> object:
    return max(found.context.budgets, key=lambda budget: getattr(budget, "params", float("inf")) or float("inf"))


@pytest.mark.parametrize("rule", ["erk", "alphapruning"])
def test_rules_of_weights_look_at_the_global_model(rule: str) -> None:
    found = policy(f"allocator={rule}")
    params = dict(state_tensors(found.context.submodels.spec.build(0)))
    small = next(i for i, budget in enumerate(found.context.budgets) if budget != max_budget(found))
    uniform = policy("allocator=uniform").counts(9, small, {}, None)[0]
    assert found.counts(9, small, {}, None)[0] == uniform
    assert found.counts(9, small, {}, params)[0] != uniform
    assert found.assign(1, small, {}, params).evidence == {"unit_scores"}


def test_a_rule_that_needs_model_and_data_in_one_place_is_refused(tmp_path: object) -> None:
    folder = tmp_path
    path = f"{folder}/function.yaml"
    with open(path, "w") as file:
        file.write("function: depth\namplitude: 0.2\npower: 1\n")
    with pytest.raises(ConfigError, match="the allocator needs model, for which the whole model and the data"):
        policy("allocator=dsa", f"allocator.path={path}")
