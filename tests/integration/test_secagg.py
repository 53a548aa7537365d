"""Secure aggregation on the local engine: the model of plain averaging, with drop-outs in every phase."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

from fedlp.apps import runs as assembly
from fedlp.federation.secagg import client
from fedlp.federation.secagg import messages as phases
from fedlp.federation.wire import messages
from fedlp.report import load_run
from tests.integration.running import TINY, TINY_CNN, App, Call, Finished, assert_refused, run

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
    assert [record.phases for record in load_run(done.path).rounds] == [line["phases"] for line in done.rounds]
    assert "phases" not in once(*TINY, "strategy=fedavg").rounds[0]


GONE = [pytest.param(phase, count, marks=pytest.mark.slow if count > 1 else ()) for phase in PHASES for count in (1, 4)]


@pytest.mark.parametrize(("phase", "count"), GONE)
def test_drop_outs_cost_nobody_else_the_round(phase: str, count: int, once: Once, tmp_path: Path) -> None:
    gone = range(3, 3 + count)
    done = run(tmp_path / "run", *MANY, SECAGG, app=silent(gone, PHASES[phase]))
    assert done.failures == [(1, client_id, "raised") for client_id in gone]
    if phase == "unmask":  # their updates count
        assert_close(done, once(*MANY))
    else:
        plain = run(tmp_path / "plain", *MANY, app=silent(gone, messages.TRAIN))
        assert_close(done, plain)


@pytest.mark.parametrize("phase", ["shares", "train", pytest.param("unmask", marks=pytest.mark.slow)])
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


def test_clients_that_drop_out_as_the_fleet_has_it_leave_the_sum_of_the_others(once: Once) -> None:
    case = (*MANY, "num_rounds=2", "fleet.dropout=0.25")
    secure, plain = once(*case, SECAGG), once(*case)
    assert secure.failures == plain.failures != []
    assert_close(secure, plain)


# ---- groups
FLEET = ("fleet=tiers", "fleet.fractions=[1.0,0.5]")
DENSE = ("upload=float32", "upload.values=deltas", "upload.error_feedback=false")
GROUPS = {
    "heterofl": ("strategy=heterofl", *FLEET, "server_optimizer=momentum"),
    "fedrolex": ("strategy=fedrolex", *FLEET, "aggregator.weighting=held"),
    "fjord": ("strategy=fjord", *FLEET, "aggregator.weighting=equal"),
    "fedlp_homo": ("strategy=fedlp_homo", "strategy.layer_preserving_rate=1", "upload.values=deltas"),
    "fedlp_hetero": ("strategy=fedlp_hetero", "strategy.depths=[1,1,1,3,3,3]"),
    "fedlp_plan": ("strategy=fedlp_plan", *FLEET, *DENSE),
    "fedlp_plan, input norms": (
        *("strategy=fedlp_plan", "strategy.spread=allocator", "allocator=owl", "pruner=random"),
        *DENSE,
    ),
    "fedlp_plan, pruned": ("strategy=fedlp_plan", *FLEET, "strategy.submodels=pruned", *DENSE),
    "batch norms": ("strategy=fedavg",),
    "frozen tensors": ("strategy=fedavg", "model.frozen=[fc1,fc2]"),
}
SOME = [pytest.param(case, marks=() if case in ("heterofl", "fedlp_plan") else pytest.mark.slow) for case in GROUPS]


@pytest.mark.slow
@pytest.mark.parametrize("case", SOME)
def test_each_group_is_a_secure_sum_of_its_own(case: str, once: Once) -> None:
    base = (*(TINY_CNN if case == "batch norms" else TINY), "clients_per_round=6", *GROUPS[case])
    secure, plain = once(*base, SECAGG, "privacy.bits=64"), once(*base, "aggregator.max_norm=null")  # no single norms
    assert secure.failures == plain.failures == []
    assert_close(secure, plain, bound=1e-5 if case == "batch norms" else 1e-6)


def test_evaluations_on_clients_are_a_sum_too(once: Once) -> None:
    case = (*TINY, "strategy=fedavg", "evaluation=both", "dataset.client_test_fraction=0.3")
    secure, plain = once(*case, SECAGG), once(*case)
    assert secure.failures == []
    for masked, open_ in zip(secure.rounds, plain.rounds, strict=True):
        assert "evaluations" not in masked
        assert masked["phases"]["evaluate"]["bytes_up"] > 0
        for way in ("bytes_down", "bytes_up"):
            assert sum(phase[way] for phase in masked["phases"].values()) == masked[way]
        assert masked["macs"] == pytest.approx(open_["macs"], rel=0.05)
        for name in ("client_loss", "client_accuracy"):
            assert masked["metrics"][name] == pytest.approx(open_["metrics"][name], abs=1e-5)
        assert "client_accuracy_worst" not in masked["metrics"]


def test_a_group_that_is_too_small_in_a_round_loses_its_round(once: Once) -> None:
    case = (*TINY, "strategy=heterofl", *FLEET, SECAGG, "clients_per_round=5", "num_rounds=4")
    done = once(*case)
    reasons = {reason for _, _, reason in done.failures}
    assert reasons == {"small_group"}
    assert all(len({f["client_id"] for f in line["failures"]}) in (0, 1, 2) for line in done.rounds)


# ---- clients that attack
def spoiled(whose: int, kind: str, key: str) -> App:
    """Return the clients' app, in which one sends other bytes in a record of secure aggregation."""

    def app(message: Message, context: Context) -> Message:
        reply = assembly.client_app(message, context)
        if message.metadata.message_type == kind and context.node_config["partition-id"] == whose:
            record = reply.content.config_records[phases.SECAGG]
            data = record[key]
            assert isinstance(data, bytes)
            record[key] = bytes(byte ^ 1 for byte in data)
        return reply

    return app


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "key", "first", "then"),
    [
        (phases.KEYS, "sealing-key", "raised", "raised"),  # whatever others seal, it cannot open; here it refuses
        (phases.SHARES, "sealed", "rejected", "rejected"),
        (phases.SHARES, "seed-digest", "rejected", "rejected"),
        (phases.UNMASK, "seed-shares", "rejected", "rejected"),
    ],
)
def test_a_client_that_cheats_in_a_phase_is_named_and_the_run_goes_on(
    kind: str, key: str, first: str, then: str, tmp_path: Path
) -> None:
    case = (*MANY, SECAGG, "num_rounds=2", "min_clients=0")
    done = run(tmp_path / "run", *case, app=spoiled(4, kind, key))
    own = {server_round: reason for server_round, client_id, reason in done.failures if client_id == 4}
    assert own == {1: first, 2: then}
    others = {(server_round, reason) for server_round, client_id, reason in done.failures if client_id != 4}
    lost = {"sealed": {(1, "group_lost")}, "seed-digest": {(1, "group_lost")}}
    assert others == lost.get(key, set()), "one that is convicted is left out of later rounds"


def test_the_server_opens_no_update(once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, came = tmp_path / "plain", []
    plain.mkdir()
    encode, decode = client.FixedPoint.encode, phases.decode_masked

    def noted(self: client.FixedPoint, values: np.ndarray, share: float) -> client.Words:
        found = encode(self, values, share)
        (plain / hashlib.sha256(found.tobytes()).hexdigest()).touch()
        return found

    def seen(content: RecordDict, *rest: int) -> object:
        assert not any(key in content for key in (messages.UPDATE, messages.METRICS, messages.SCORES))
        found = decode(content, *rest)
        came.append(hashlib.sha256(found[0].tobytes()).hexdigest())
        return found

    def opened(*_: object) -> None:
        raise AssertionError("the server opens an update")

    expected = once(*TINY, "strategy=fedavg", SECAGG)
    monkeypatch.setattr(client.FixedPoint, "encode", noted)
    monkeypatch.setattr(phases, "decode_masked", seen)
    monkeypatch.setattr(messages, "decode_update", opened)
    done = run(tmp_path / "run", *TINY, "strategy=fedavg", SECAGG)
    assert done.model == expected.model
    assert len(came) == len({path.name for path in plain.iterdir()}) == 8
    assert not {path.name for path in plain.iterdir()} & {*came}


# ---- what is refused
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "needs strategy.layer_preserving_rate=1: draws"),
        ("strategy=fedlp_plan strategy.unit_selection=client upload=float32", "needs strategy.unit_selection=server"),
        ("strategy=fedavg aggregator=median", "needs aggregator=coverage_average: aggregator=median looks at single"),
        ("strategy=fedavg upload=topk", "needs upload=float32"),
        (
            "strategy=fedavg upload.values=deltas upload.error_feedback=true",
            "upload.error_feedback=false",
        ),
        (
            "strategy=heterofl fleet=tiers",
            "needs aggregator.batch_norm=average or whole",
        ),
        (
            "strategy=fedavg evaluation=clients evaluation.clients=2 dataset.client_test_fraction=0.2",
            "evaluations or more, but evaluation.clients=2",
        ),
        ("strategy=fedavg fleet.extra_clients=1", "needs fleet.extra_clients=0"),
        ("strategy=fedavg clients_per_round=2", "privacy.min_group=3 updates or more, but clients_per_round=2"),
        ("strategy=fedavg privacy.value_range=1e9", "bits behind the point .* or set privacy.bits=64"),
        (
            "strategy=fedlp_hetero strategy.depths=[1,1,2,2,2,2] num_clients=6 clients_per_round=6",
            "privacy.min_group=3 updates or more, but 2 of 6 clients hold depth 1",
        ),
        ("strategy=fedavg privacy.threshold=0.5", r"privacy.threshold=0.5 .* in \(0.5, 1\]"),
        ("strategy=fedavg privacy.min_group=1", "privacy.min_group=1"),
        ("strategy=fedavg privacy.bits=16", "privacy.bits=16"),
        ("strategy=fedavg privacy.value_range=0", "privacy.value_range=0"),
    ],
)
def test_what_needs_single_updates_is_refused(arguments: str, words: str, call: Call) -> None:
    assert_refused(call(SECAGG, *arguments.split()), words)
