"""Pruned sub-models calibrated on clients: what a tier receives is what pruning on their pooled data gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Error, Message
from torch import Tensor

from fedlp.apps import runs as assembly
from fedlp.apps.federate import Federation
from fedlp.apps.runs import make_runtime
from fedlp.config import compose, to_yaml
from fedlp.errors import ConfigError
from fedlp.federation.oneshot import messages as wire
from fedlp.federation.server.checkpoint import load_checkpoint
from fedlp.federation.strategies.plan_policy import PlanPolicy
from fedlp.models import state_tensors
from fedlp.pruning.pruner import Calibration, Pruner
from fedlp.pruning.tracing.units import find_layers
from fedlp.training.calibration_data import make_method
from tests.integration.running import Finished, run
from tests.integration.test_pruned_submodels import PRUNED
from tests.integration.test_resume import assert_same, go_on

Once = Callable[..., Finished]
LLAMA = (
    *("model=llama_tiny", "model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=2"),
    *("dataset=topics", "dataset.sequence_length=32", "dataset.max_train_examples=96", "dataset.max_test_examples=10"),
    *("partition=iid", "calibration.examples=8", "calibration.batch_size=4", "local.batch_size=8"),
    *("num_clients=6", "clients_per_round=6", "num_rounds=2", "strategy=fedlp_plan", "strategy.submodels=pruned"),
    *("pruner=slimgpt", "strategy.sparsity=0", "upload=float32", "upload.entropy_coding=false", "simulation.workers=2"),
    *("fleet=tiers", "fleet.fractions=[1.0,0.8,0.6]", "fleet.limited=[params]"),
)
POOLED = (*LLAMA, "strategy.calibrate_on=clients")


def central_offsets(done: Finished) -> dict[int, Mapping[str, Tensor]]:
    """Return each client's received values less its slice, pruned on the capable clients' examples in one place."""
    plan = Federation(done.config)
    side = make_runtime(to_yaml(done.config), str(done.path / "clients")).pooling
    state = load_checkpoint(done.path / "checkpoint")
    assert state is not None
    assert isinstance(plan.policy, PlanPolicy)
    capable = [i for i in range(6) if plan.policy.pruned and not plan.policy.pruned.units(i, state.memory)]
    batches = [batch for client in capable for batch in side.calibration(client).batches]
    found = {}
    for client_id in set(range(6)) - set(capable):
        submodel = plan.policy.assign(1, client_id, state.memory, state.params).submodel
        kept = {layer.name: layer.num_units for layer in plan.submodels.layers}
        kept |= {axis: keep.count for axis, keep in submodel.widths.items()}
        model = plan.submodels.spec.build(done.config.seed).eval()
        method = replace(make_method(done.config.pruner), keeps_batch_norm=True)
        layers = find_layers(model, plan.submodels.widths, False)
        pruned = Pruner(model, plan.submodels.widths, layers, Calibration(batches, [], 0), method).prune(kept)
        assert {axis: keep for axis, keep in pruned.widths.items() if not keep.is_full} == submodel.widths
        plain = plan.submodels.layout(submodel).slice(state_tensors(model))
        found[client_id] = {name: value - plain[name] for name, value in state_tensors(pruned.model).items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("allocator", ["owl", "dp"])
def test_pooled_is_central(once: Once, allocator: str) -> None:
    done = once(*POOLED, f"allocator={allocator}", "local.lr=1e-30")
    assert done.failures == []
    state = load_checkpoint(done.path / "checkpoint")
    assert state is not None
    policy = Federation(done.config).policy
    assert isinstance(policy, PlanPolicy)
    expected = central_offsets(done)
    assert len(expected) == 4
    for client_id, values in expected.items():
        offset = policy.offset(client_id, state.memory).values
        assert offset, "what stays is refitted"
        for name, value in values.items():
            got = offset.get(name, torch.zeros_like(value))
            torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-5)


def test_bytes_of_the_sums_count_in_the_round(once: Once) -> None:
    done = once(*POOLED, "allocator=owl", "local.lr=1e-30")
    first, second = done.rounds[:2]
    columns = 2 * (48 * 49 // 2 + 32 * 33 // 2)  # lower triangles of two down_proj and two o_proj
    assert first["bytes_up"] - second["bytes_up"] > 2 * 4 * columns, "of two clients, at least once"


@pytest.mark.slow
def test_workers_and_a_stop_change_no_byte(once: Once, tmp_path: Path) -> None:
    overrides = (*POOLED, "strategy.refit_every=2", "local.lr=0.01")
    whole = once(*overrides, "num_rounds=4")
    assert whole.failures == []
    assert run(tmp_path / "one", *overrides, "num_rounds=4", "simulation.workers=1").model == whole.model
    shutil.copytree(once(*overrides, "num_rounds=2").path, tmp_path / "run")
    assert_same(go_on(tmp_path / "run", 4), whole)


@pytest.mark.slow
def test_a_refit_sends_the_model_of_its_round(once: Once) -> None:
    done = once(*POOLED, "strategy.refit_every=2", "local.lr=0.01", "num_rounds=4")
    down = [entry["bytes_down"] for entry in done.rounds]
    size = sum(tensor.numel() * 4 for tensor in done.tensors.values())
    assert down[2] - down[0] > 1.5 * size, "two clients get the whole model before the third round"
    assert down[1] == pytest.approx(down[3], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [wire.MODEL, wire.MOMENTS])
def test_a_refit_without_a_good_answer_leaves_the_submodels(
    kind: str, once: Once, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, the few clients that hold the whole model could end the run in any round of a refit."""

    refit = tmp_path / "refit"  # which begins with the model

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == wire.MODEL:
            refit.touch()
        if message.metadata.message_type == kind and refit.exists():
            return Message(Error(7, "\n"), reply_to=message)
        return assembly.client_app(message, context)

    options = (*POOLED, "strategy.refit_every=2", "local.lr=0.01", "num_rounds=3")
    done = run(tmp_path / "run", *options, app=app)
    assert {(number, reason) for number, _, reason in done.failures} == {(3, "error")}
    why = {wire.MODEL: "no client has taken on the model", wire.MOMENTS: "query."}[kind]
    assert f"round 3: pruned sub-models stay as they are: {why}" in caplog.text
    assert done.model == once(*POOLED, "local.lr=0.01", "num_rounds=3").model


def test_clients_are_asked_once_by_default() -> None:
    policy = Federation(compose(POOLED)).policy
    assert isinstance(policy, PlanPolicy)
    assert policy.pruned is not None
    assert policy.pruned.refit_every == 0


@pytest.mark.slow
def test_classifiers_are_pooled_too(once: Once) -> None:
    done = once(*PRUNED, "strategy.calibrate_on=clients", "clients_per_round=6", "calibration.examples=30")
    assert done.failures == []


def test_nobody_holds_the_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no client's budget holds the whole model"):
        run(tmp_path / "run", *POOLED, "fleet.fractions=[0.8,0.6]")


SECURE = (*POOLED, "fleet.fractions=[1.0,0.6]", "pruner.damping=0.01", "aggregator=coverage_average")


@pytest.mark.slow
def test_masked_sums_prune_as_open_ones(once: Once) -> None:
    """Nothing is trained, so that rounds move nothing: what clients receive is what calibration gave."""
    secure = once(*SECURE, "local.lr=1e-30", "num_rounds=1", "privacy=secagg", "privacy.bits=64")
    plain = once(*SECURE, "local.lr=1e-30", "num_rounds=1")
    assert secure.failures == plain.failures == []
    states = [load_checkpoint(done.path / "checkpoint") for done in (secure, plain)]
    assert states[0] is not None
    assert states[1] is not None
    assert states[0].memory.keys() == states[1].memory.keys()
    assert states[1].memory
    for name, value in states[1].memory.items():
        torch.testing.assert_close(states[0].memory[name], value, rtol=1e-4, atol=1e-4, msg=name)
    assert {"keys", "shares", "moments", "unmask", "train"} <= {*secure.rounds[0]["phases"]}
    for way in ("bytes_down", "bytes_up"):
        assert sum(phase[way] for phase in secure.rounds[0]["phases"].values()) == secure.rounds[0][way]


def test_no_client_shows_its_sums(tmp_path: Path) -> None:
    def app(message: Message, context: Context) -> Message:
        reply = assembly.client_app(message, context)
        if message.metadata.message_type == wire.MOMENTS and wire.ANSWER in reply.content:
            raise AssertionError("sums in the open")
        return reply

    done = run(tmp_path, *SECURE, "num_rounds=1", "privacy=secagg", app=app)
    assert done.failures == []
    assert "moments" in done.rounds[0]["phases"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("pruner.damping=null",), "two halves of the clients .* and 3 clients hold the whole model"),
        (("fleet.fractions=[1.0,0.8,0.6]",), "2 of 6 clients hold"),
    ],
)
def test_too_few_holders_of_the_whole_for_a_secure_sum_are_refused(options: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Federation(compose((*SECURE, "num_clients=6", "privacy=secagg", *options)))


def test_privacy_is_refused() -> None:
    with pytest.raises(ConfigError, match="privacy=secagg alone protects"):
        Federation(compose((*POOLED, "privacy=local_dp", "pruner=random", "upload.values=weights")))
