"""Plans per client: within budgets, nested where the server chooses, remembered where clients do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.errors import AllocationError, ConfigError, ProtocolError
from fedlp.federation.strategies.plan_policy import PlanPolicy
from fedlp.federation.strategies.policy import Answer
from fedlp.federation.wire import messages
from fedlp.models import state_tensors
from fedlp.types import (
    Assignment,
    ClientProfile,
    ClientReport,
    ClientUpdate,
    InputNorms,
    Keep,
    SubModel,
    TrainInstruction,
)

CLIENTS = ("strategy.unit_selection=client", "strategy.train_sent=false")  # choose units themselves
TIERS = ("fleet=tiers", "fleet.fractions=[1.0,0.3,0.1]", "num_clients=6", "clients_per_round=6")


@lru_cache
def unlimited(*overrides: str) -> PlanPolicy:
    found = assembly.make_plan(to_yaml(compose(["strategy=fedlp_plan", "model=fedlp_cnn", *overrides]))).policy
    assert isinstance(found, PlanPolicy)
    return found


def policy(*overrides: str) -> PlanPolicy:
    return unlimited(*TIERS, *overrides)


def answered(
    client_id: int, examples: int, widths: dict[str, Keep], scores: dict[str, torch.Tensor] | None = None
) -> Answer:
    """Return an answer of a client that returns all that it holds."""
    report = ClientReport(1, client_id, examples, {}, widths, scores or {})
    return Assignment(1, client_id, SubModel(widths=widths), frozenset()), report


def answer(
    found: PlanPolicy, client_id: int, examples: int, values: float, widths: dict[str, Keep] | None = None
) -> Answer:
    """Return an answer of a client that holds ``widths``, scored by unit number times ``values``."""
    held = widths or {}
    scores = {}
    for layer in found.context.submodels.layers:
        units = held.get(layer.name, Keep.full(layer.num_units)).indices()
        scores[layer.name] = values * torch.from_numpy(units).double()
    return answered(client_id, examples, held, scores)


def test_scores_are_those_of_all_examples_together() -> None:
    found = policy("strategy.unit_selection=server")
    layer = found.context.submodels.layers[0]
    half = {layer.name: Keep.first(layer.num_units // 2, layer.num_units)}
    memory = found.remember({}, 1, [answer(found, 0, 10, 1.0), answer(found, 1, 30, 3.0, half)])
    pooled = memory[f"score.{layer.name}"]
    units = torch.arange(layer.num_units, dtype=torch.float64)
    expected = torch.where(units < layer.num_units // 2, units * (10 * 1.0 + 30 * 3.0) / 40, units)
    torch.testing.assert_close(pooled, expected)
    later = found.remember(memory, 2, [answer(found, 1, 5, 0.0, half)])
    torch.testing.assert_close(later[f"score.{layer.name}"][layer.num_units // 2 :], expected[layer.num_units // 2 :])
    assert later[f"seen.{layer.name}"].tolist() == [2] * (layer.num_units // 2) + [1] * (
        layer.num_units - layer.num_units // 2
    )


@pytest.mark.parametrize("spread", ["allocator", "macs"])
@pytest.mark.parametrize("rule", ["uniform", "depth_line", "log_depth", "flap", "dp"])
def test_every_rule_meets_every_budget(rule: str, spread: str) -> None:
    strategy = (f"strategy.spread={spread}", "strategy.sparsity=0.4")
    found = policy(f"allocator={rule}", *strategy, "fleet.limited=[params,macs]")
    memory = found.remember({}, 1, [answer(found, client, 10, 1.0 + client) for client in range(6)])
    for past in ({}, memory):
        for client in range(6):
            held, sent = found.counts(9, client, past)
            budget = found.context.budgets[client]
            assert budget is not None
            rows = np.array([[counts[name] for name in found.costs.layers] for counts in (held, sent)], dtype=float)
            params, macs = found.costs.evaluate(rows)[:, :2].T
            assert params[0] <= budget.params * (1 + 1e-9)
            assert macs[0] <= budget.macs * (1 + 1e-9)
            assert all(1 <= sent[name] <= held[name] for name in held)
            assert (
                params[1] <= found.solver._params({x.name: x.num_units for x in found.context.submodels.layers}) * 0.61
            )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fedlp_cnn", "resnet18"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
def test_what_moves_follows_the_work_of_weights(model: str, sparsity: float) -> None:
    """No exchange of units between two axes gives a better sum of MACs times the log of the share that moves."""
    found = unlimited(f"model={model}", "strategy.spread=macs", f"strategy.sparsity={sparsity}")
    names, sizes = found.costs.layers, np.array([x.num_units for x in found.context.submodels.layers], dtype=float)
    assert names == tuple(x.name for x in found.context.submodels.layers)
    _, sent = found.counts(9, 0, {})
    kept = np.array([sent[name] for name in names], dtype=float)
    alone = found.costs.evaluate(sizes * (1 - np.eye(len(sizes))))[:, 1]
    work = found.costs.evaluate(sizes[None])[0, 1] - alone
    limit = found.solver._params(dict(zip(names, sizes.astype(int).tolist(), strict=True)))
    least = found.solver._params(dict.fromkeys(names, 0))
    limit -= sparsity * (limit - least)

    def params(units: np.ndarray) -> float:
        return float(found.costs.evaluate(units[None])[0, 0])

    assert params(kept) <= limit * (1 + 1e-9)
    best = float((work * np.log(kept / sizes)).sum())
    for less in range(len(kept)):
        for more in range(len(kept)):
            trial = kept.copy()
            trial[less] -= max(1, int(0.02 * sizes[less]))
            while less != more and trial[less] >= 1 and trial[more] < sizes[more]:
                trial[more] += 1
                if params(trial) > limit:
                    break
                value = float((work * np.log(trial / sizes)).sum())
                assert value <= best + 1e-2 * abs(best), f"{names[less]} gives to {names[more]}"


def test_what_moves_is_the_same_for_all_as_far_as_they_hold_it() -> None:
    found = policy("strategy.spread=macs", "fleet.fractions=[1.0,0.5,0.1]", "strategy.regrow=0.5")
    memory = found.remember({}, 1, [answer(found, 0, 10, 1.0)])
    moves = {}
    for client in np.argsort([-budget.params for budget in found.context.budgets if budget is not None]).tolist():
        held, sent = found.counts(9, client, memory)
        assigned = found.assign(9, client, memory)
        for layer in found.context.submodels.layers:
            whole = Keep.full(layer.num_units)
            units = set(assigned.submodel.widths.get(layer.name, whole).indices().tolist())
            moving = set(assigned.returned.get(layer.name, assigned.submodel.widths.get(layer.name, whole)).indices())
            assert (len(units), len(moving)) == (held[layer.name], sent[layer.name])
            all_that_move = moves.setdefault(layer.name, moving)
            assert moving <= all_that_move
            assert moving in (all_that_move, units)


@pytest.mark.slow
def test_units_are_drawn_anew_where_nobody_else_would_move_them() -> None:
    """By default: in whole fleets, and where nobody holds the whole model; else what scores best stays."""
    drawn = {}
    for name, found in {
        "all": unlimited("strategy.sparsity=0.9"),
        "some": policy("fleet.fractions=[1.0,0.3]"),
        "none": policy("fleet.fractions=[0.5,0.3]"),
    }.items():
        memory = found.remember({}, 1, [answer(found, 0, 10, 1.0)])
        small = max(
            range(len(found.context.budgets)), key=lambda client: -getattr(found.context.budgets[client], "params", 0)
        )
        _, sent = found.counts(9, small, memory)
        layer = min(found.context.submodels.layers, key=lambda x: sent[x.name] / x.num_units)
        units = [
            {**assigned.submodel.widths, **assigned.returned}[layer.name].indices().tolist()
            for assigned in (found.assign(number, small, memory) for number in (8, 9))
        ]
        best = list(range(layer.num_units - sent[layer.name], layer.num_units))
        drawn[name] = units != [best, best]
    assert drawn == {"all": True, "some": False, "none": True}


def evidence_of(found: PlanPolicy) -> frozenset[str]:
    return found.assign(1, 0, {}).evidence


@pytest.mark.slow
def test_nobody_scores_units_where_nothing_depends_on_it() -> None:
    assert evidence_of(unlimited("strategy.spread=allocator")) == {"unit_scores"}
    assert not evidence_of(unlimited("strategy.spread=macs"))
    assert evidence_of(unlimited("strategy.spread=macs", "strategy.regrow=0.5")) == {"unit_scores"}
    assert evidence_of(policy("strategy.spread=macs")) == {"unit_scores"}, "what clients hold depends on it"
    assert not evidence_of(policy("strategy.spread=macs", "fleet.fractions=[1.0]")), "all hold all"


def test_only_clients_that_hold_everything_measure_where_asked() -> None:
    everybody, whole = policy(), policy("strategy.measured_by=whole")
    for client_id in range(6):
        asked, other = (found.assign(1, client_id, {}) for found in (whole, everybody))
        assert other.evidence == {"unit_scores"}
        assert asked.evidence == (frozenset() if asked.submodel.widths else {"unit_scores"})
        assert replace(asked, evidence=other.evidence) == other
    assert {bool(whole.assign(1, client_id, {}).evidence) for client_id in range(6)} == {True, False}


def test_measurements_by_whole_clients_need_one() -> None:
    with pytest.raises(ConfigError, match="measured_by=whole needs a client whose budget holds the whole model"):
        policy("strategy.measured_by=whole", "fleet.fractions=[0.5,0.3]")


def test_a_client_keeps_its_units_and_widens_only_when_its_plan_does() -> None:
    found = policy("allocator=uniform", "strategy.sparsity=0", *CLIENTS, "strategy.regrow=0")
    small = max(range(6), key=lambda client: -found.context.budgets[client].params)  # type: ignore[union-attr]
    first = found.assign(1, small, {}).submodel.widths
    memory = found.remember({}, 1, [answered(small, 5, dict(first))])
    own = {axis: Keep.from_indices(np.arange(1, 2 * keep.count, 2), keep.size) for axis, keep in first.items()}
    memory = found.remember(memory, 2, [answered(small, 5, own)])
    assert found.assign(3, small, memory).submodel.widths == own


def test_stale_units_come_back() -> None:
    found = policy("strategy.unit_selection=server", "strategy.regrow=0.5", "allocator=uniform", "strategy.sparsity=0")
    memory = found.remember({}, 1, [answer(found, 0, 10, 1.0)])
    small = max(range(6), key=lambda client: -found.context.budgets[client].params)  # type: ignore[union-attr]
    layer = found.context.submodels.layers[-1]
    seen: set[int] = set()
    for server_round in range(2, 40):
        assigned = found.assign(server_round, small, memory)
        seen |= set(assigned.submodel.widths[layer.name].indices().tolist())
        widths = assigned.submodel.widths
        memory = found.remember(memory, server_round, [answered(small, 5, dict(widths))])
    assert seen == set(range(layer.num_units))


def test_an_unreachable_budget_names_client_and_limit() -> None:
    found = policy("fleet.fractions=[1.0,0.00001]")
    refused = [client for client in range(6) if found.context.budgets[client].params < 100]  # type: ignore[operator,union-attr]
    with pytest.raises(AllocationError, match=rf"client {refused[0]}: its budget of params=.* is out of reach"):
        found.assign(1, refused[0], {})
    assert sum(case.probability for case in found.cases(range(6))) == pytest.approx(1.0)
    assert len(found.cases(range(6))) == 1, "one kind of client is left"


# ------------------------------------------------------------------------------------------------------------- messages
PROFILE = ClientProfile(4, 50)


def initial(found: PlanPolicy) -> dict[str, torch.Tensor]:
    return dict(state_tensors(found.context.submodels.spec.build(found.context.seed)))


def asked(found: PlanPolicy) -> tuple[TrainInstruction, ClientUpdate]:
    """Return an instruction to choose a few units of the first axis, and a right answer."""
    submodels = found.context.submodels
    layer, other = submodels.layers[:2]
    held = {layer.name: Keep.first(8, layer.num_units)}
    names = submodels.layout(SubModel()).name_set
    returned = {other.name: Keep.first(4, other.num_units)}
    instruction = TrainInstruction(
        3, 4, SubModel(widths=held), names, {layer.name: 3}, returned, frozenset({"unit_scores"})
    )
    chosen = {layer.name: Keep.from_indices(np.array([1, 4, 7]), layer.num_units)}
    layout = submodels.layout(SubModel(widths={**held, **returned, **chosen}))
    values = layout.slice(initial(found))
    sizes = [held[x.name].count if x.name in held else x.num_units for x in submodels.layers]
    scores = {x.name: torch.rand(size) for x, size in zip(submodels.layers, sizes, strict=True)}
    return instruction, ClientUpdate(3, 4, 50, {}, chosen, scores, params=values)


def test_choices_and_scores_go_there_and_back() -> None:
    found = policy()
    instruction, update = asked(found)
    params = found.context.submodels.layout(instruction.submodel).slice(initial(found))
    content = messages.encode_instruction(instruction, messages.encode_params(params), found.context.submodels)
    got = messages.decode_instruction(content, found.context.submodels)
    assert (got.kept, got.returned, got.evidence) == (instruction.kept, instruction.returned, {"unit_scores"})
    back = messages.decode_update(
        messages.encode_update(update, found.context.submodels), got, PROFILE, found.context.submodels
    )
    assert back.widths == {**instruction.submodel.widths, **instruction.returned, **update.widths}
    for name, scores in back.scores.items():
        torch.testing.assert_close(scores, update.scores[name].double(), rtol=2**-8, atol=0)
    assert all(torch.equal(value, update.params[name]) for name, value in back.params.items())


def with_widths(update: ClientUpdate, indices: Sequence[int], size: int) -> ClientUpdate:
    axis = next(iter(update.widths))
    keep = Keep.from_indices(np.array(indices), size)
    return replace(update, widths={axis: keep})


def test_a_client_may_send_no_scores() -> None:
    found = policy()
    instruction, update = asked(found)
    submodels = found.context.submodels
    content = messages.encode_update(replace(update, scores={}), submodels)
    assert messages.decode_update(content, instruction, PROFILE, submodels).scores == {}


def test_wrong_choices_and_scores_are_refused() -> None:
    found = policy()
    instruction, update = asked(found)
    axis = next(iter(update.widths))
    size = found.context.submodels.widths.axes[axis]
    bad = [
        ("asked for", with_widths(update, [1, 4], size)),
        ("does not hold", with_widths(update, [1, 4, 9], size)),
        ("chooses units of", replace(update, widths={})),
        ("choosing units took -1", replace(update, metrics={"pruning-macs": -1.0}, scores={})),
    ]
    for value in (-1.0, float("nan"), float("inf")):
        wrong = {**update.scores, axis: torch.full_like(update.scores[axis], value)}
        bad.append((f"a score of {axis} is not", replace(update, scores=wrong)))
    for text, answered in bad:
        with pytest.raises(ProtocolError, match=f"client 4, round 3: .*{text}"):
            messages.decode_update(
                messages.encode_update(answered, found.context.submodels), instruction, PROFILE, found.context.submodels
            )


def asked_for_norms(found: PlanPolicy) -> tuple[TrainInstruction, ClientUpdate]:
    """Return an instruction that asks for input norms of a client that holds 8 units of the first axis, and norms."""
    instruction, update = asked(found)
    instruction = replace(instruction, evidence=frozenset({"unit_scores", "input_norms"}))
    submodels, norms = found.context.submodels, {}
    for layer in submodels.layers:
        held = instruction.submodel.widths.get(layer.name, Keep.full(layer.num_units)).count
        for path in layer.readers:
            columns = submodels.reader_columns[path] // layer.num_units * held
            norms[path] = InputNorms(torch.rand(columns, dtype=torch.float64) * 100, 7)
    return instruction, replace(update, input_norms=norms)


def test_input_norms_go_there_and_back() -> None:
    found = policy()
    instruction, update = asked_for_norms(found)
    submodels = found.context.submodels
    params = submodels.layout(instruction.submodel).slice(initial(found))
    content = messages.encode_instruction(instruction, messages.encode_params(params), submodels)
    assert messages.decode_instruction(content, submodels).evidence == {"unit_scores", "input_norms"}
    back = messages.decode_update(messages.encode_update(update, submodels), instruction, PROFILE, submodels)
    assert back.input_norms.keys() == update.input_norms.keys()
    for path, norms in back.input_norms.items():
        assert norms.count == 7
        torch.testing.assert_close(norms.total, update.input_norms[path].total, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("total", "count", "words"),
    [
        (-1.0, 7, "an input norm is not a finite number of at least 0"),
        (float("nan"), 7, "an input norm is not a finite number of at least 0"),
        (float("inf"), 7, "an input norm is not a finite number of at least 0"),
        (1.0, 10**13, "a count of input vectors is outside"),
        (1.0, -1, "a count of input vectors is outside|at least 0"),
    ],
)
def test_wrong_input_norms_are_refused(total: float, count: int, words: str) -> None:
    found = policy()
    instruction, update = asked_for_norms(found)
    path = next(iter(update.input_norms))
    wrong = InputNorms(torch.full_like(update.input_norms[path].total, total), count)
    answered = replace(update, input_norms={**update.input_norms, path: wrong})
    with pytest.raises(ProtocolError, match=f"client 4, round 3: .*({words})"):
        messages.decode_update(
            messages.encode_update(answered, found.context.submodels), instruction, PROFILE, found.context.submodels
        )


def test_input_norms_that_do_not_come_are_read_as_none() -> None:
    found = policy()
    instruction, update = asked_for_norms(found)
    content = messages.encode_update(replace(update, input_norms={}), found.context.submodels)
    read = messages.decode_update(content, instruction, PROFILE, found.context.submodels)
    assert read.input_norms == {}  # as of a client with too few examples
