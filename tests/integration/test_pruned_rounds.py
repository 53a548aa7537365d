"""Rounds in which clients prune: budgets met, only kept slices move, equal on every engine and after a stop."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.federation.strategies.plan_policy import PlanPolicy
from fedlp.types import Keep, SubModel, TrainInstruction
from tests.integration.running import TINY_CNN, Finished, run
from tests.integration.test_resume import assert_same, go_on

Once = Callable[..., Finished]
DEFAULT = (*TINY_CNN, "strategy=fedlp_plan", "calibration.examples=8")
OURS = (
    *(*DEFAULT, "pruner=magnitude", "strategy.unit_selection=client", "strategy.train_sent=false"),
    *("strategy.regrow=0", "strategy.refresh_every=1"),
)
MLP = ("model=fedlp_mlp", "model.variant=deep")  # quick
OBS = (*OURS, "pruner=obs", "pruner.fisher=false")
PLAIN = ("upload=float32", "upload.error_feedback=false")
TIERS = ("fleet=tiers", "fleet.fractions=[1.0,0.3,0.1]")


def plan_of(done: Finished) -> tuple[assembly.Federation, PlanPolicy]:
    plan = assembly.make_plan(to_yaml(done.config))
    assert isinstance(plan.policy, PlanPolicy)
    return plan, plan.policy


def changed(overrides: Sequence[str], done: Finished) -> dict[str, Tensor]:
    before = assembly.make_plan(to_yaml(compose(overrides))).initial_params()
    return {name: (after != before[name]) for name, after in done.tensors.items()}


def test_nothing_pruned_and_nothing_encoded_is_fedavg(once: Once) -> None:
    ours = once(*OURS, *PLAIN, "strategy.sparsity=0", "upload.values=weights")
    assert ours.model == once(*TINY_CNN, "strategy=fedavg").model


def test_differences_in_float32_are_fedavg_to_rounding(once: Once) -> None:
    deltas, weights = (
        once(*TINY_CNN, "strategy=fedavg", f"upload.values={kind}", "num_rounds=1").tensors  # training amplifies it
        for kind in ("deltas", "weights")
    )
    for name, value in deltas.items():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("masks", ["client", "server"])
def test_uploads_meet_the_sparsity(masks: str, once: Once) -> None:
    done = once(*OURS, f"strategy.unit_selection={masks}", "strategy.sparsity=0.6")
    assert done.failures == []
    plan, policy = plan_of(done)
    whole = plan.submodels.layout(plan.policy.assign(1, 0, {}).submodel).num_params()
    sizes = {layer.name: layer.num_units for layer in plan.submodels.layers}
    least = policy.costs.evaluate(torch.zeros(1, len(sizes)).numpy())[0, 0]
    for line in done.rounds:
        for client in line["clients"]:
            assert client["params_down"] == whole
            assert client["params_up"] <= whole - 0.6 * (whole - least)
            assert client["params_up"] >= 0.9 * (whole - 0.6 * (whole - least))
            assert client["bytes_up"] < 1.1 * client["params_up"] + 6000, "a byte a number, and little else"


@pytest.mark.slow
def test_bits_are_what_a_number_costs(once: Once) -> None:
    costs = {}
    for encoding in ("int8", "int4", "int2"):
        uncoded = ("upload.entropy_coding=false", f"upload={encoding}")
        done = once(*OURS, *uncoded, "upload.error_feedback=true")
        assert done.failures == []
        costs[encoding] = done.rounds[0]["clients"][0]
    params = costs["int8"]["params_up"]
    for encoding, bits in (("int4", 4), ("int2", 2)):
        saved = costs["int8"]["bytes_up"] - costs[encoding]["bytes_up"]
        assert 0.9 * params < saved / (1 - bits / 8) < params


@pytest.mark.slow
@pytest.mark.parametrize("coarseness", [1, 4])
def test_codes_change_the_bytes_and_nothing_else(coarseness: int, once: Once) -> None:
    encoding = ("upload=int2", f"upload.coarseness={coarseness}", "upload.error_feedback=true")
    plain, coded = (once(*OURS, *encoding, f"upload.entropy_coding={given}") for given in ("false", "true"))
    assert plain.failures == coded.failures == []
    assert coded.model == plain.model
    for one, other in zip(plain.rounds, coded.rounds, strict=True):
        before, after = (sum(client["bytes_up"] for client in line["clients"]) for line in (one, other))
        params = sum(client["params_up"] for client in one["clients"])
        saved = 2 - (1.5 if coarseness == 1 else 0.8)  # bits a number
        assert before - after > params * saved / 8


def test_only_what_was_returned_moves(once: Once) -> None:
    one = ("strategy.spread=allocator", "strategy.sparsity=0.7", "num_rounds=1", "clients_per_round=1")
    overrides = (*OURS, *PLAIN, *one)
    done = once(*overrides)
    moved = changed(overrides, done)
    units = moved["conv1.weight"].flatten(1).any(dim=1)
    assert 0 < int(units.sum()) < len(units)
    assert torch.equal(moved["conv1.bias"], units)
    assert torch.equal(moved["conv2.weight"].flatten(2).any(dim=2).any(dim=0), units), "rows there, columns here"


@pytest.mark.slow
@pytest.mark.parametrize("masks", ["client", "server"])
def test_every_budget_is_met_and_every_layer_trained(masks: str, once: Once) -> None:
    done = once(*OURS, *TIERS, f"strategy.unit_selection={masks}", "strategy.sparsity=0.2", "clients_per_round=6")
    _, policy = plan_of(done)
    assert done.failures == []
    for line in done.rounds:
        for client in line["clients"]:
            budget = policy.context.budgets[client["client_id"]]
            assert budget is not None
            assert budget.params is not None
            assert client["params_up"] <= client["params_down"] <= budget.params
        assert min(line["coverage"].values()) > 0.0
    assert len({client["params_down"] for client in done.rounds[0]["clients"]}) == 3


def test_a_budget_out_of_reach_costs_its_client_alone(once: Once) -> None:
    done = once(*OURS, "fleet=tiers", "fleet.fractions=[1.0,0.0001]", "clients_per_round=6", "num_rounds=1")
    failures = done.rounds[0]["failures"]
    assert len(failures) == 3
    assert all(failure["reason"] == "refused" and "out of reach" in failure["message"] for failure in failures)
    assert len(done.rounds[0]["clients"]) == 3


@pytest.mark.slow
def test_server_masks_of_smaller_budgets_nest(once: Once) -> None:
    done = once(*OURS, *TIERS, "strategy.unit_selection=server", "allocator=uniform", "clients_per_round=6")
    _, policy = plan_of(done)
    memory = RunDirectory(done.path).resume().memory
    kinds = {policy.context.budgets[client]: policy.assign(9, client, memory).submodel.widths for client in range(6)}
    ordered = sorted(kinds.items(), key=lambda item: item[0].params)
    for (_, small), (_, large) in pairwise(ordered):
        for axis, keep in small.items():
            keep.within(large.get(axis, Keep.full(keep.size)))  # or it raises


CHOICES = {
    "as they are by default": (
        "pruner=obs",
        "strategy.unit_selection=server",
        "strategy.train_sent=true",
        "strategy.regrow=1",
    ),
    "obs on the update, all of it": ("pruner=obs", "upload.error_feedback=true", "strategy.criterion=update", *TIERS),
    "random": ("pruner=random",),
    "wanda, compensated by least squares": (
        *("pruner=wanda", "pruner.recovery=least_squares", "strategy.compensate=true", "upload=bfloat16"),
    ),
    "slimgpt, server, seldom": ("pruner=slimgpt", "strategy.unit_selection=server", "strategy.refresh_every=2", *TIERS),
    "taylor, draws on top": ("pruner=taylor", "strategy.layer_preserving_rate=0.5", "strategy.regrow=0.3"),
    "flap, warm": ("pruner=flap", "strategy.warmup_rounds=1", "strategy.ramp_rounds=1", "allocator=flap"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHOICES)
def test_choices_give_the_same_bytes_on_any_number_of_workers(case: str, tmp_path: Path) -> None:
    runs = [run(tmp_path / n, *OURS, *MLP, *CHOICES[case], f"simulation.workers={n}") for n in ("1", "2")]
    assert runs[0].failures == []
    assert runs[0].model == runs[1].model
    assert runs[0].untimed == runs[1].untimed


@pytest.mark.slow
@pytest.mark.parametrize("case", ["obs on the update, all of it", "as they are by default"])
def test_a_run_in_pieces_ends_like_one_in_one_piece(case: str, once: Once, tmp_path: Path) -> None:
    overrides = (*OURS, *MLP, *CHOICES[case])
    shutil.copytree(once(*overrides, "num_rounds=1").path, tmp_path / "run")
    assert_same(go_on(tmp_path / "run", 3), once(*overrides, "num_rounds=3"))


@pytest.mark.slow
def test_sparsity_waits_and_rises(once: Once) -> None:
    done = once(*OURS, *PLAIN, "strategy.warmup_rounds=1", "strategy.ramp_rounds=1", "num_rounds=4", "pruner=random")
    sent = [line["params_up"] / line["params_down"] for line in done.rounds]
    assert sent[0] == 1.0
    assert sent[0] > sent[1] > sent[2] == pytest.approx(sent[3], rel=0.05)


def test_sparsity_falls_where_it_began_high(once: Once) -> None:
    ramp = ("strategy.ramp_from=0.9", "strategy.ramp_rounds=2", "strategy.sparsity=0.3")
    done = once(*OURS, *PLAIN, *ramp, "num_rounds=4", "pruner=random")
    sent = [line["params_up"] / line["params_down"] for line in done.rounds]
    assert sent[0] < sent[1] < sent[2] == pytest.approx(sent[3], rel=0.05)


@pytest.mark.slow
def test_choosing_units_is_counted_as_computation(once: Once) -> None:
    scored, drawn = once(*OBS, "num_rounds=1"), once(*OURS, "pruner=random", "num_rounds=1")
    assert scored.rounds[0]["macs"] > drawn.rounds[0]["macs"]
    coarse = once(*OBS, "num_rounds=1", "strategy.scores=coarse")
    assert scored.rounds[0]["macs"] > coarse.rounds[0]["macs"] > drawn.rounds[0]["macs"]
    assert not coarse.failures


def test_only_what_will_be_sent_is_trained(tmp_path: Path) -> None:
    cfg = to_yaml(
        compose([*OURS, *PLAIN, "strategy.unit_selection=server", "strategy.train_sent=true", "strategy.regrow=1"])
    )
    plan, runtime = assembly.make_plan(cfg), assembly.make_runtime(cfg, str(tmp_path))
    params = plan.initial_params()
    assigned = plan.policy.assign(1, 2, {})
    instruction = TrainInstruction(1, 2, assigned.submodel, assigned.uploads, {}, assigned.returned, params=params)
    update = runtime.train(instruction)
    sent = plan.submodels.layout(SubModel(widths=assigned.returned))
    _, state = runtime._skeleton(None, (), False)
    for name, before in params.items():
        if not plan.submodels.spec.tensors[name].trainable:
            continue
        changed = state[name] != before
        inside = torch.zeros_like(changed)
        keeps = sent.keeps.get(name, tuple(Keep.full(size) for size in before.shape))
        inside[torch.meshgrid(*(torch.from_numpy(keep.indices()) for keep in keeps), indexing="ij")] = True
        assert not bool((changed & ~inside).any()), name
        assert bool(changed.any()), name
        torch.testing.assert_close(update.params[name], (state[name] - before)[inside].view(sent.shape(name)))


@pytest.mark.slow
def test_wide_models_can_count_for_more(once: Once) -> None:
    overrides = (*OURS, *PLAIN, *TIERS, "strategy.sparsity=0", "num_rounds=1", "clients_per_round=6")
    examples, held = (once(*overrides, f"aggregator.weighting={kind}").tensors for kind in ("examples", "held"))
    assert any(not torch.equal(value, held[name]) for name, value in examples.items())


# ---- clients with hardly any data
SCARCE = (*MLP, "partition=dirichlet", "partition.alpha=0.2", "dataset.max_train_examples=30", "clients_per_round=6")


@pytest.mark.parametrize("options", [(), ("strategy.compensate=true",)], ids=["plain", "compensated"])
def test_clients_with_one_example_train_and_choose_units_but_send_no_scores(
    options: tuple[str, ...], once: Once
) -> None:
    done = once(*OBS, *SCARCE, "strategy.sparsity=0.4", "strategy.spread=allocator", *options)
    sizes = {client["client_id"]: client["num_examples"] for client in done.rounds[0]["clients"]}
    assert [sizes[client] for client in (0, 3)] == [1, 1]
    assert not done.failures
    alone = changed([*OBS, *SCARCE, "strategy.sparsity=0.4", "strategy.spread=allocator", *options], done)
    assert all(bool(entries.any()) for name, entries in alone.items() if name.endswith("weight"))


def test_clients_without_a_whole_window_of_text_take_part(once: Once, tmp_path: Path) -> None:
    speakers = [f"{name}:\n{'so ' * length}\n\n" for name, length in zip("ABCDEF", (60, 60, 60, 60, 4, 3), strict=True)]
    (tmp_path / "play.txt").write_text("".join(speakers))
    text = ("dataset=text", f"dataset.root={tmp_path / 'play.txt'}", "dataset.sequence_length=32", "partition=natural")
    small = ("model=llama_tiny", "model.num_layers=1", "model.hidden_size=16", "num_rounds=1")
    done = once(*OBS, *small, *text, "strategy.sparsity=0.4", "clients_per_round=6", "dataset.max_train_examples=null")
    assert not done.failures
