"""Each method gives clients the parts it says, and states their distribution rightly."""

from __future__ import annotations

import numpy as np
import pytest

from fedlp.config import ModelConfig
from fedlp.errors import ConfigError
from fedlp.federation.costs import Costs, expected_costs
from fedlp.federation.strategies.fedavg import FedAvg
from fedlp.federation.strategies.fedlp_hetero import FedLPHetero
from fedlp.federation.strategies.fedlp_homo import FedLPHomo
from fedlp.federation.strategies.fedrolex import FedRolex
from fedlp.federation.strategies.fjord import FjORD
from fedlp.federation.strategies.heterofl import HeteroFL
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.encodings.float32 import Float32
from fedlp.models import describe_model, state_tensors
from fedlp.types import Keep
from tests.reference.policies import unlimited_policy


@pytest.fixture(scope="module")
def submodels() -> SubModels:
    return SubModels(
        describe_model(ModelConfig(name="fedlp_cnn", source="fedlp_cnn"), (3, 32, 32), 10, "classification")
    )


def test_heterofl_keeps_the_first_units_of_every_axis(submodels: SubModels) -> None:
    policy = unlimited_policy(HeteroFL(widths=[0.5]), 0, 4, submodels)
    for round_number in (1, 9):
        widths = policy.submodel(round_number, 2).widths
        assert widths == {axis: Keep.first(size // 2, size) for axis, size in submodels.widths.axes.items()}


def test_fedrolex_moves_by_one_unit_a_round_and_reaches_everything(submodels: SubModels) -> None:
    policy = unlimited_policy(FedRolex(widths=[0.25]), 0, 4, submodels)
    axis, size = next(iter(submodels.widths.axes.items()))
    seen: set[int] = set()
    for server_round in range(1, size + 1):
        keep = policy.submodel(server_round, 0).widths[axis]
        assert keep.count == size // 4
        assert (server_round - 1) % size in keep.indices()
        seen.update(keep.indices().tolist())
    assert seen == set(range(size))


def test_fjord_draws_only_widths_that_the_client_can_hold(submodels: SubModels) -> None:
    policy = unlimited_policy(FjORD(widths=[0.25, 0.5, 1.0]), 0, 50, submodels)
    found = {policy.submodel(1, client).nested_levels for client in range(50)}
    assert found == {(0.25,), (0.25, 0.5), (0.25, 0.5, 1.0)}


def test_a_rate_or_a_depth_per_client(submodels: SubModels) -> None:
    rates = [0.0, 1.0, 0.5]
    homo = unlimited_policy(FedLPHomo(layer_preserving_rate=rates), 0, 3, submodels)
    everything = frozenset(submodels.spec.tensors)
    assert homo.uploads(1, 0, homo.submodel(1, 0)) == frozenset()
    assert homo.uploads(1, 1, homo.submodel(1, 1)) == everything
    assert sum(case.probability * case.layer_preserving_rate for case in homo.cases(range(3))) == pytest.approx(0.5)
    hetero = unlimited_policy(FedLPHetero(depths=[5, 1, 3]), 0, 3, submodels)
    assert [hetero.submodel(1, client).depth for client in range(3)] == [5, 1, 3]


@pytest.mark.parametrize(
    ("depths", "words"),
    [
        (6, "depths 1 to 5"),
        ([1, 2, 9], "depths 1 to 5"),
        ([0, 1, 2], r"strategy\.depths=\[0, 1, 2\] is not allowed: .* a depth \(1, 2, \.\.\.\)"),
    ],
)
def test_a_depth_that_does_not_exist_is_refused(submodels: SubModels, depths: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        unlimited_policy(FedLPHetero(depths=depths), 0, 3, submodels)


WIDTHS = [0.25, 1.0]
STRATEGIES = [FedAvg(), FedLPHomo(0.5), FedLPHetero(), HeteroFL(WIDTHS), FjORD(WIDTHS), FedRolex(WIDTHS)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_the_expected_cost_is_the_mean_over_what_clients_get(submodels: SubModels, strategy: object) -> None:
    policy = unlimited_policy(strategy, 0, 3000, submodels)
    cases = policy.cases(range(3000))
    assert sum(case.probability for case in cases) == pytest.approx(1.0)
    params = state_tensors(submodels.spec.build(0))
    expected = expected_costs(cases, submodels, Costs(submodels), params, Float32(), coded=False)
    down, up = [], []
    for client in range(3000):
        submodel = policy.submodel(1, client)
        layout = submodels.layout(submodel)
        down.append(layout.num_params())
        up.append(layout.num_params(policy.uploads(1, client, submodel)))
    assert np.mean(down) == pytest.approx(expected["params_down_per_client"], rel=0.05)
    assert np.mean(up) == pytest.approx(expected["params_up_per_client"], rel=0.05)
