"""Secure aggregation on the local engine: the model of plain averaging, with drop-outs in every phase."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message

from fedlp.apps import federate as assembly
from fedlp.federation.secagg import messages as phases
from fedlp.federation.wire import messages
from tests.integration.running import TINY, App, Finished, run

Once = Callable[..., Finished]
SECAGG = "privacy=secagg"
MANY = (*TINY, "num_clients=10", "clients_per_round=10", "num_rounds=1", "strategy=fedavg")
PHASES = {"keys": phases.KEYS, "shares": phases.SHARES, "train": messages.TRAIN, "unmask": phases.UNMASK}


def silent(clients: Collection[int], kind: str) -> App:
    """Return the clients' app, in which some do their work in a phase but their answer never comes."""

    def app(message: Message, context: Context) -> Message:
        reply = assembly.client_app(message, context)
        if message.metadata.message_type == kind and context.node_config["partition-id"] in clients:
            raise RuntimeError("lost on the way")
        return reply

    return app


def assert_close(one: Finished, other: Finished, bound: float = 1e-6) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, value in one.tensors.items():
        torch.testing.assert_close(value, other.tensors[name], rtol=0, atol=bound, msg=name)


def test_the_model_is_that_of_plain_averaging(once: Once) -> None:
    secure, plain = once(*TINY, "strategy=fedavg", SECAGG), once(*TINY, "strategy=fedavg")
    assert secure.failures == []
    assert_close(secure, plain)
    for masked, open_ in zip(secure.rounds, plain.rounds, strict=True):
        assert masked["metrics"]["train_loss"] == pytest.approx(open_["metrics"]["train_loss"], abs=1e-6)
        assert masked["macs"] == open_["macs"]
        assert all(cost["train_loss"] is None for cost in masked["clients"])


def test_keys_differ_between_runs_and_the_model_does_not(once: Once, tmp_path_factory: pytest.TempPathFactory) -> None:
    overrides = (*TINY, "strategy=fedavg", SECAGG)
    again = run(tmp_path_factory.mktemp("again"), *overrides, "simulation.workers=1")
    assert again.model == once(*overrides).model
    assert again.untimed == once(*overrides).untimed


def test_bytes_of_every_phase_are_counted_both_ways(once: Once) -> None:
    done = once(*TINY, "strategy=fedavg", SECAGG)
    for line in done.rounds:
        assert list(line["phases"]) == list(PHASES)
        for way in ("bytes_down", "bytes_up"):
            assert sum(phase[way] for phase in line["phases"].values()) == line[way]
            assert all(phase[way] > 0 for phase in line["phases"].values())
    assert "phases" not in once(*TINY, "strategy=fedavg").rounds[0]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("count", [1, 4])
def test_drop_outs_cost_nobody_else_the_round(phase: str, count: int, once: Once, tmp_path: Path) -> None:
    gone = range(3, 3 + count)
    done = run(tmp_path / "run", *MANY, SECAGG, app=silent(gone, PHASES[phase]))
    assert done.failures == [(1, client_id, "raised") for client_id in gone]
    if phase == "unmask":  # their updates count
        assert_close(done, once(*MANY))
    else:
        plain = run(tmp_path / "plain", *MANY, app=silent(gone, messages.TRAIN))
        assert_close(done, plain)


@pytest.mark.parametrize("phase", ["shares", "train", "unmask"])
def test_a_group_below_its_threshold_loses_its_round_and_no_run(phase: str, tmp_path: Path) -> None:
    case = (*MANY, SECAGG, "num_rounds=2", "min_clients=0")
    lost = silent(range(5), PHASES[phase])

    def app(message: Message, context: Context) -> Message:
        return (lost if message.metadata.group_id == "1" else assembly.client_app)(message, context)

    done = run(tmp_path / "run", *case, app=app)
    assert sorted(done.failures) == [
        (1, client_id, "raised" if client_id < 5 else "group_lost") for client_id in range(10)
    ]
    assert done.rounds[0]["coverage"] == dict.fromkeys(done.rounds[0]["coverage"], 0.0)
    assert done.rounds[1]["failures"] == []
    assert done.rounds[1]["coverage"] == dict.fromkeys(done.rounds[1]["coverage"], 1.0)
