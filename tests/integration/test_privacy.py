"""Clipped and noised uploads: what they leave of a run, on any engine, and what they are refused with."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import mod
from flwr.compat.common.recorddict_compat import recorddict_to_fitres
from flwr.server.workflow import SecAggPlusWorkflow
from torch import Tensor

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.errors import TrainingError
from fedlp.federation.wire.messages import encode_update
from fedlp.types import ClientUpdate
from tests.integration.running import TINY, Call, Finished, assert_refused, run

Once = Callable[..., Finished]
ONE = (*TINY, "num_rounds=1")
FEDAVG = ("strategy=fedavg", "aggregator.weighting=equal")
DP = "privacy=local_dp"
LOOSE = (DP, "privacy.clipping_norm=100", "privacy.epsilon=1e12")
SLIGHT = (DP, "privacy.clipping_norm=0.01", "privacy.epsilon=1e12")


def change(done: Finished, overrides: Sequence[str]) -> Tensor:
    """Return how far the model moved, all its weights in one vector."""
    before = assembly.make_plan(to_yaml(compose(overrides))).initial_params()
    return torch.cat([(value - before[name]).flatten() for name, value in done.tensors.items()])


FEDLP = ("strategy=fedlp_plan", "strategy.sparsity=0", "upload=float32", "upload.values=weights")
DENSE = {
    "fedavg": ("strategy=fedavg",),
    "fedlp_homo at rate 1": ("strategy=fedlp_homo", "strategy.layer_preserving_rate=1"),
    "fedlp_hetero": ("strategy=fedlp_hetero",),
    "heterofl": ("strategy=heterofl",),
    "fjord": ("strategy=fjord",),
    "fedrolex": ("strategy=fedrolex",),
    "fedlp, nothing left out": (
        *(*FEDLP, "upload.error_feedback=false", "strategy.unit_selection=server", "pruner=random"),
        *("fleet=tiers", "fleet.fractions=[1.0,0.3]"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DENSE)
def test_a_loose_clip_and_hardly_any_noise_change_nothing(case: str, once: Once) -> None:
    noised, plain = once(*TINY, *DENSE[case], *LOOSE), once(*TINY, *DENSE[case])
    assert noised.failures == []
    for name, value in noised.tensors.items():
        torch.testing.assert_close(value, plain.tensors[name], rtol=1e-4, atol=1e-5)


def test_a_round_moves_the_model_no_further_than_the_clip(once: Once) -> None:
    overrides = (*ONE, *FEDAVG, *SLIGHT)
    moved, free = change(once(*overrides), overrides), change(once(*ONE, *FEDAVG), overrides)
    assert free.norm() > 0.02
    assert 0.001 < moved.norm() <= 0.01 * (1 + 1e-4)


def test_noise_has_the_size_that_the_mechanism_asks_for_and_each_client_its_own(once: Once) -> None:
    overrides = (*ONE, *FEDAVG, DP, "privacy.clipping_norm=0.1", "privacy.epsilon=0.5", "privacy.delta=1e-4")
    moved = change(once(*overrides), overrides)
    deviation = 2 * 0.1 * math.sqrt(2 * math.log(1.25 / 1e-4)) / 0.5
    assert float(moved.std()) == pytest.approx(deviation / math.sqrt(4), rel=0.02), "the mean of four clients' noise"


@pytest.mark.slow
def test_noise_is_new_every_time_unless_it_is_seeded(once: Once, tmp_path: Path) -> None:
    overrides = (*TINY, *FEDAVG, DP, "privacy.clipping_norm=0.01")
    assert once(*overrides).failures == []
    assert run(tmp_path / "a", *overrides).model != once(*overrides).model
    seeded = (*overrides, "privacy.seeded=true")
    one = run(tmp_path / "b", *seeded, "simulation.workers=1")
    assert one.model == once(*seeded).model
    assert one.untimed == once(*seeded).untimed


def test_the_loss_of_a_client_stays_with_it(once: Once) -> None:
    assert all("train_loss" in line["metrics"] for line in once(*TINY, *DENSE["fedavg"]).rounds)
    assert not any("train_loss" in line["metrics"] for line in once(*TINY, *DENSE["fedavg"], *LOOSE).rounds)


def test_a_client_that_learnt_nothing_is_named(once: Once) -> None:
    words = "4 updates failed, most of them raised, such as: DataError: client .*: training changed no weight"
    with pytest.raises(TrainingError, match=words):
        once(*ONE, *FEDAVG, DP, "local.lr=1e-30")


def test_an_epsilon_without_a_promise_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedlp"):
        assembly.make_plan(to_yaml(compose([*ONE, *FEDAVG, DP, "seed=77", "privacy.epsilon=2"])))
    assert "privacy.epsilon=2: the Gaussian mechanism" in caplog.text


# ---- what is refused
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "needs strategy.layer_preserving_rate=1: "),
        ("strategy.layer_preserving_rate=[1,1,0.5] num_clients=3 clients_per_round=3", "layer_preserving_rate=1: "),
        ("strategy=fedavg upload=int8", "needs upload=float32 and upload.values=weights"),
        ("strategy=fedavg upload.values=deltas", "needs upload=float32 and upload.values=weights"),
        ("strategy=fedlp_plan upload=float32", "upload.values=weights .and error_feedback=false"),
        (" ".join([*FEDLP[:1], *FEDLP[2:], "upload.error_feedback=false"]), "needs strategy.sparsity=0"),
        (" ".join([*FEDLP, "upload.error_feedback=false fleet=mixed"]), "a fleet that does not limit uploads"),
        (" ".join([*FEDLP, "upload.error_feedback=false"]), "needs pruner=random: scores of units"),
        ("federated=true model=fedlp_cnn dataset=digits sparsity=0.3", "clients send sums over their data"),
        ("strategy=fedavg", "bn1.running_mean is an untrained float32 tensor.*model=small_cnn, or model.norm=group"),
        ("strategy=fedavg privacy.epsilon=0", "privacy.epsilon=0"),
        ("strategy=fedavg privacy.clipping_norm=inf", "privacy.clipping_norm=inf"),
        ("strategy=fedavg privacy.delta=1", r"privacy.delta=1.* in \(0, 1\)"),
        ("strategy=fedavg privacy.name=central", "one of none, local_dp"),
        ("strategy=fedavg privacy.sensitivity=1", "no option privacy.sensitivity"),
    ],
)
def test_what_cannot_be_noised(arguments: str, words: str, call: Call) -> None:
    assert_refused(call(DP, *arguments.split()), words)


def test_group_norm_in_place_of_batch_norm_is_no_obstacle() -> None:
    options = ("strategy=fedavg", DP, "dataset=cifar10", "model=resnet18")
    assert assembly.make_plan(to_yaml(compose([*options, "model.norm=group"]))).config.privacy.name == "local_dp"


# ---- Flower's other mods
def test_secure_aggregation_of_flower_knows_the_old_messages_alone() -> None:
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(TypeError, match="Expect a LegacyContext"):
        SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2)(None, context)  # type: ignore[arg-type]
    plan = assembly.make_plan(to_yaml(compose([*ONE, *FEDAVG])))
    update = encode_update(ClientUpdate(1, 0, 5, {}, params=plan.initial_params()), plan.submodels)
    with pytest.raises(KeyError, match=r"fitres\.parameters"):
        recorddict_to_fitres(update, keep_input=True)


def test_mods_that_measure_messages_fit_around_the_app(once: Once, tmp_path: Path) -> None:
    def measured(message: Message, context: Context) -> Message:
        def inner(message: Message, context: Context) -> Message:
            return mod.arrays_size_mod(message, context, assembly.client_app)

        return mod.message_size_mod(message, context, inner)

    done = run(tmp_path / "run", *TINY, *DENSE["fedavg"], app=measured)
    assert done.failures == []
    assert done.model == once(*TINY, *DENSE["fedavg"]).model
