"""Whole rounds on the local engine: equal to a plain loop, equal to themselves, and honest about their bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.training.loop import train_locally
from tests.integration.running import TINY, TINY_CNN, Finished, run
from tests.reference import federated_loop

HETERO = "strategy=fedlp_hetero"
METHODS = {
    "fedavg": ("strategy=fedavg",),
    "homo": ("strategy=fedlp_homo", "strategy.layer_preserving_rate=0.5"),
    "homo by tensor, equal weights": (
        "strategy=fedlp_homo",
        "strategy.upload_unit=tensor",
        "aggregator.weighting=equal",
    ),
    "hetero": (HETERO,),
    "hetero, heads forgotten": (HETERO, "strategy.persist_heads=false"),
}
DIRICHLET = ("partition=dirichlet", "partition.min_examples=4")  # clients of unequal weight


def initial(config: Sequence[str]) -> dict[str, Tensor]:
    return assembly.make_plan(to_yaml(compose(config))).initial_params()


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are not bitwise equal."""
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


Once = Callable[..., Finished]


# ---- equal to a plain loop
@pytest.mark.parametrize("method", METHODS)
def test_the_engine_is_a_plain_loop(method: str, once: Once) -> None:
    done = once(*TINY_CNN, *DIRICHLET, *METHODS[method])
    assert differing(done.tensors, federated_loop.run(done.config, train_locally)) == []


def test_examples_beyond_the_cohorts_bound_do_not_count(once: Once) -> None:
    case = (*TINY, *DIRICHLET, "strategy=fedavg", "clients_per_round=6")
    done = once(*case, "aggregator.max_examples=1.5")
    assert differing(done.tensors, federated_loop.run(done.config, train_locally)) == []
    assert done.model != once(*case).model
    assert once(*case).model == once(*case, "aggregator.max_norm=null", "aggregator.max_examples=null").model


# BatchNorm on a few examples makes a difference in the last bit ten times larger with every step: one step a round.
@pytest.mark.parametrize("case", [(*TINY, "local.epochs=2"), (*TINY_CNN, "local.batch_size=20")], ids=["mlp", "cnn"])
def test_local_training_is_plain_sgd(case: tuple[str, ...], once: Once) -> None:
    done = once(*case, "strategy=fedavg")
    plain = federated_loop.run(done.config)
    for name, tensor in done.tensors.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


# ---- equal to itself
@pytest.mark.slow
@pytest.mark.parametrize("method", ["homo", "hetero"])
def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(method: str, tmp_path: Path) -> None:
    runs = [run(tmp_path / n, *TINY_CNN, *METHODS[method], f"simulation.workers={n}") for n in ("1", "2", "3")]
    assert len({done.model for done in runs}) == 1
    assert all(done.untimed == runs[0].untimed for done in runs)


def test_another_seed_gives_another_model(once: Once) -> None:
    assert once(*TINY, "seed=0").model != once(*TINY, "seed=1").model


# ---- the ends of the layer-preserving rate
def test_rate_1_is_fedavg(once: Once) -> None:
    fedavg = once(*TINY_CNN, *DIRICHLET, "strategy=fedavg")
    for rate in ("1.0", "[1,1,1,1,1,1]"):
        homo = once(*TINY_CNN, *DIRICHLET, "strategy=fedlp_homo", f"strategy.layer_preserving_rate={rate}")
        assert homo.model == fedavg.model
        assert homo.untimed == fedavg.untimed


@pytest.mark.parametrize("optimizer", ["none", "momentum", "adam"])
def test_rate_0_leaves_the_model_as_it_was(optimizer: str, once: Once) -> None:
    rate = ("strategy=fedlp_homo", "strategy.layer_preserving_rate=0.0", f"server_optimizer={optimizer}")
    done = once(*TINY_CNN, *rate)
    assert differing(done.tensors, initial([*TINY_CNN, *rate])) == []
    assert all(line["params_up"] == 0 and set(line["coverage"].values()) == {0.0} for line in done.rounds)


# ---- FedLP-Hetero
ALL_OF_DEPTH_2 = (HETERO, "strategy.depths=[2,2,2,2,2,2]")


def test_layers_that_nobody_trains_keep_their_bits(once: Once) -> None:
    done = once(*TINY_CNN, *ALL_OF_DEPTH_2)
    spec = assembly.make_plan(to_yaml(done.config)).submodels.spec
    changed = set(differing(done.tensors, initial([*TINY_CNN, *ALL_OF_DEPTH_2])))
    assert changed == spec.depths[1]
    for line in done.rounds:
        trained = {name for name, part in line["coverage"].items() if part}
        assert trained == {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ("strategy=fedavg", "upload.values=deltas", "upload=int8"),
        ("strategy=fedlp_homo",),
        (HETERO,),
        ("strategy=fjord", "strategy.widths=[1.0,0.5]"),
        ("strategy=fedlp_plan", "fleet=tiers", "fleet.fractions=[1.0,0.4]", "calibration.examples=8"),
        ("strategy=fedlp_plan", "strategy.spread=allocator", "pruner=taylor", "strategy.unit_selection=client"),
    ],
    ids=lambda method: " ".join(method[:2]),
)
def test_frozen_layers_neither_move_nor_travel_back(method: tuple[str, ...], once: Once) -> None:
    frozen = ("model.frozen=[fc1,fc5,fc6]", "num_rounds=1")  # the first of them, and the last
    done, free = once(*TINY, *method, *frozen), once(*TINY, *method, "num_rounds=1")
    assert done.failures == []
    plan = assembly.make_plan(to_yaml(done.config))
    before = plan.initial_params()
    still = {name for name, values in done.tensors.items() if torch.equal(values, before[name])}
    assert still >= plan.submodels.spec.frozen
    assert still < before.keys()
    for cost in ("bytes_up", "params_up", "macs"):
        mine, theirs = (sum(client[cost] for client in of.rounds[0]["clients"]) for of in (done, free))
        assert mine < theirs
    assert done.rounds[0]["coverage"]["fc1"] == 0.0


@pytest.mark.slow
def test_heads_are_kept_between_rounds_or_forgotten(once: Once) -> None:
    everyone = (*TINY, *ALL_OF_DEPTH_2, "clients_per_round=6")
    kept, forgotten = (once(*everyone, f"strategy.persist_heads={flag}") for flag in ("true", "false"))
    first_rounds = [once(*everyone, f"strategy.persist_heads={flag}", "num_rounds=1") for flag in ("true", "false")]
    assert first_rounds[0].model == first_rounds[1].model, "the first round starts from the first head either way"
    assert kept.model != forgotten.model
    assert not (forgotten.path / "clients").exists()
    first, second = (load_file(kept.path / f"clients/3/round-{r:06d}.safetensors") for r in (1, 2))
    assert all(name.startswith("personal_head") for name in first)
    assert set(differing(first, second)) == set(first)


# ---- width slices
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["heterofl", "fjord", "fedrolex"])
def test_only_entries_of_the_slices_are_touched(strategy: str, once: Once) -> None:
    everyone = ("aggregator.batch_norm=average", "num_rounds=1", "clients_per_round=6")
    overrides = (*TINY_CNN, f"strategy={strategy}", "strategy.widths=[0.25,0.5]", *everyone)
    done = once(*overrides)
    plan = assembly.make_plan(to_yaml(done.config))
    before = initial(overrides)
    untouched = 0
    for name, after in done.tensors.items():
        covered = torch.zeros(after.shape, dtype=torch.bool)
        for client in range(6):
            layout = plan.submodels.layout(plan.policy.submodel(1, client))
            where = [torch.from_numpy(keep.indices()) for keep in layout.keeps.get(name, ())]
            covered[torch.meshgrid(*where, indexing="ij") if where else ...] = True
        changed = after != before[name]
        assert not (changed & ~covered).any(), name
        assert changed.any(), name
        untouched += int((~covered).sum())
    assert untouched > 0


def test_the_window_of_fedrolex_moves(once: Once) -> None:
    overrides = (*TINY, "strategy=fedrolex", "strategy.widths=[0.5]", "clients_per_round=6")
    one, two = (once(*overrides, f"num_rounds={n}").tensors for n in (1, 2))
    reached_the_next_unit = False
    for name in [name for name in one if name.endswith("bias") and len(one[name]) != 10]:  # classes are not units
        changed = (one[name] != two[name]).nonzero().flatten()
        half = len(one[name]) // 2
        assert changed.min() >= 1, "in round 2 the window starts at unit 1"
        assert changed.max() <= half
        reached_the_next_unit |= bool((changed == half).any())
    assert reached_the_next_unit


@pytest.mark.slow
def test_the_widest_level_alone_is_fedavg(once: Once) -> None:
    fedavg = once(*TINY_CNN, *DIRICHLET, "strategy=fedavg")
    for strategy in ("heterofl", "fedrolex", "fjord"):
        assert once(*TINY_CNN, *DIRICHLET, f"strategy={strategy}", "strategy.widths=[1.0]").model == fedavg.model


# ---- server optimisers
def test_a_server_rate_of_one_half_goes_half_way(once: Once) -> None:
    one_round = (*TINY_CNN, "strategy=fedavg", "num_rounds=1")
    before, average = initial(one_round), once(*one_round).tensors
    for optimizer in ("none", "momentum"):  # the first step of momentum is a plain one
        half = once(*one_round, "server_optimizer.lr=0.5", f"server_optimizer={optimizer}").tensors
        for name, value in half.items():
            is_buffer = "running" in name or "num_batches" in name
            expected = average[name] if is_buffer else before[name] + 0.5 * (average[name] - before[name])
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("method", ["homo", "hetero"])
def test_server_optimisers_train(optimizer: str, method: str, once: Once) -> None:
    lr = {"momentum": 1.0, "adam": 0.03}[optimizer]
    chosen = (f"server_optimizer={optimizer}", f"server_optimizer.lr={lr}")
    done = once(*TINY, *METHODS[method], *chosen, "num_rounds=8")
    losses = [line["metrics"]["train_loss"] for line in done.rounds]
    assert done.failures == []
    assert losses[-1] < losses[0]


# ---- bytes
def check_sums(done: Finished) -> None:
    for line in done.rounds:
        assert [client["client_id"] for client in line["clients"]] == line["cohort"]
        for key in ("bytes_up", "bytes_down", "params_up", "params_down", "macs"):
            assert line[key] == sum(client[key] for client in line["clients"])
    for key in ("bytes_up", "bytes_down", "params_up", "params_down", "macs"):
        assert done.manifest["totals"][key] == pytest.approx(sum(line[key] for line in done.rounds))
    assert done.manifest["totals"]["rounds"] == len(done.rounds)


@pytest.mark.parametrize("method", METHODS)
def test_costs_add_up(method: str, once: Once) -> None:
    done = once(*TINY_CNN, *DIRICHLET, *METHODS[method])
    check_sums(done)
    config = done.config
    plan = assembly.make_plan(to_yaml(config))
    for line in done.rounds:
        for client in line["clients"]:
            submodel = plan.policy.submodel(line["server_round"], client["client_id"])
            layout = plan.submodels.layout(submodel)
            uploads = plan.policy.uploads(line["server_round"], client["client_id"], submodel)
            assert client["params_down"] == layout.num_params()
            assert client["params_up"] == layout.num_params(uploads)
            assert client["macs"] == plan.costs.macs(submodel).training * client["num_examples"] * config.local.epochs
            for way, names in (("down", layout.names), ("up", uploads)):
                payload = sum(tensor.nbytes for name, tensor in plan.initial_params().items() if name in names)
                assert payload <= client[f"bytes_{way}"] <= payload + 1024, "values, and little else"


@pytest.mark.slow
def test_measured_uploads_agree_with_what_was_expected(once: Once) -> None:
    rate, rounds = 0.3, 40
    one_step = ("dataset.max_train_examples=24", "local.batch_size=4", "eval_every=1000", "checkpoint_every=1000")
    homo = ("strategy=fedlp_homo", f"strategy.layer_preserving_rate={rate}")
    done = once(*TINY_CNN, *one_step, *homo, f"num_rounds={rounds}", "clients_per_round=6")
    check_sums(done)
    plan = assembly.make_plan(to_yaml(done.config))
    contacts, expected, values = 6 * rounds, done.manifest["expected"], plan.initial_params()
    sizes = {
        "params": [layer.num_params for layer in plan.submodels.spec.layers],
        "bytes": [sum(values[name].nbytes for name in layer.tensors) for layer in plan.submodels.spec.layers],
    }
    for unit, of_layers in sizes.items():
        mean = done.manifest["totals"][f"{unit}_up"] / contacts
        deviation = math.sqrt(rate * (1 - rate) * sum(size**2 for size in of_layers) / contacts)
        assert abs(mean - expected[f"{unit}_up_per_client"]) < 4 * deviation
    assert done.manifest["totals"]["params_down"] / contacts == expected["params_down_per_client"]
    assert done.manifest["totals"]["bytes_down"] / contacts == pytest.approx(expected["bytes_down_per_client"], abs=8)


def test_measured_costs_of_given_depths_are_exactly_what_was_expected(once: Once) -> None:
    depths = (HETERO, "strategy.depths=[1,2,3,4,5,5]")
    done = once(*TINY_CNN, *depths, "clients_per_round=6", "num_rounds=1")
    for way in ("up", "down"):
        expected = done.manifest["expected"]
        assert done.manifest["totals"][f"params_{way}"] / 6 == pytest.approx(expected[f"params_{way}_per_client"])
        assert done.manifest["totals"][f"bytes_{way}"] / 6 == pytest.approx(expected[f"bytes_{way}_per_client"], abs=8)
