"""Whole runs on the virtual clock of a fleet: synchronous rounds, deadlines, buffered asynchronous rounds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fedlp.apps.runs import federation_of
from fedlp.config import compose
from fedlp.errors import ConfigError, DataError, TrainingError
from fedlp.federation.fleet import tier_names
from fedlp.training.loop import train_locally
from tests.hostile import attacks
from tests.integration.running import TINY, TINY_CNN, Finished, read, run
from tests.integration.test_resume import assert_same, go_on
from tests.reference import fedbuff, federated_loop

Once = Callable[..., Finished]

ONE = "+fleet.devices={pi: {memory_bytes: 4e9, flops: 1e10, uplink_bytes_s: 5e6, watts: 7}}"
TWO = (
    "+fleet.devices={fast: {memory_bytes: 4e9, flops: 2e10, uplink_bytes_s: 5e6, downlink_bytes_s: 1e7, watts: 10}, "
    "slow: {memory_bytes: 4e9, flops: 1e9, uplink_bytes_s: 5e5}}"
)
PLAIN = (*TINY, "strategy=fedavg", "num_rounds=3")
MANY = (*TINY, "strategy=fedavg", "num_clients=8", "num_rounds=4", TWO, "fleet.clock=virtual")
BUFFERED = (*MANY, "rounds=asynchronous", "rounds.buffer_size=2", "num_rounds=6")


def late(done: Finished) -> list[tuple[int, int]]:
    return [(number, client_id) for number, client_id, reason in done.failures if reason == "late"]


# ---- synchronous
@pytest.mark.parametrize("rounds", ["rounds=synchronous", "rounds=asynchronous"])
def test_with_equal_devices_the_model_is_the_one_without_a_clock(rounds: str, once: Once) -> None:
    done = once(*PLAIN, ONE, "fleet.clock=virtual", rounds)
    assert done.model == once(*PLAIN).model
    assert [line["cohort"] for line in done.rounds] == [line["cohort"] for line in once(*PLAIN).rounds]
    assert {time["staleness"] for line in done.rounds for time in line["simulated"]["clients"]} == {0}


@pytest.mark.slow
def test_without_deadline_slow_devices_change_time_alone(once: Once) -> None:
    done, plain = once(*MANY), once(*MANY[:-1])
    assert done.model == plain.model
    assert all("simulated" not in line for line in plain.rounds)


def test_seconds_are_those_of_bytes_and_operations(once: Once) -> None:
    done = once(*MANY)
    start = 0.0
    for line in done.rounds:
        found = line["simulated"]
        for time in found["clients"]:
            cost = next(one for one in line["clients"] if one["client_id"] == time["client_id"])
            down, flops, up = (1e7, 2e10, 5e6) if time["device"] == "fast" else (5e5, 1e9, 5e5)
            expected = (cost["bytes_down"] / down, 2 * cost["macs"] / flops, cost["bytes_up"] / up)
            assert (time["download_s"], time["training_s"], time["upload_s"]) == pytest.approx(expected)
            assert time["started_s"] == start
        slowest = max(one["download_s"] + one["training_s"] + one["upload_s"] for one in found["clients"])
        assert found["seconds"] == pytest.approx(slowest)
        start += found["seconds"]
        assert found["since_start_s"] == pytest.approx(start)
        start = found["since_start_s"]
        fast, slow = found["devices"]["fast"], found["devices"]["slow"]
        assert (fast["clients"], slow["clients"], slow["energy_j"]) == (4, 4, None)
        assert fast["asked"] + slow["asked"] == 4 == fast["finished"] + slow["finished"]
        assert fast["energy_j"] == pytest.approx(10 * fast["busy_s"])
        assert fast["utilisation"] == pytest.approx(fast["busy_s"] / (4 * found["seconds"]))


def test_who_is_late_is_named_and_its_update_dropped(once: Once) -> None:
    done = once(*MANY, "rounds.deadline_s=0.5")
    lost = late(done)
    assert lost
    assert {reason for _, _, reason in done.failures} == {"late"}
    expected = federated_loop.run(done.config, train_locally, lost)
    for name, values in done.tensors.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-6)
    for line in done.rounds:
        found, gone = line["simulated"], {client_id for number, client_id in lost if number == line["server_round"]}
        slow = {time["client_id"] for time in found["clients"] if time["device"] == "slow"}
        assert gone == slow == {time["client_id"] for time in found["clients"] if not time["finished"]}
        assert found["seconds"] == (pytest.approx(0.5) if gone else found["seconds"])
        assert found["devices"]["slow"]["busy_s"] == pytest.approx(0.5 * len(gone))


def test_of_more_clients_the_fastest_are_taken(once: Once) -> None:
    done = once(*MANY, "clients_per_round=2", "fleet.extra_clients=2")
    for line in done.rounds:
        times = {time["client_id"]: time for time in line["simulated"]["clients"]}
        fast = sorted(i for i in line["cohort"] if times[i]["device"] == "fast")
        slow = sorted(i for i in line["cohort"] if times[i]["device"] == "slow")
        taken = {cost["client_id"] for cost in line["clients"] if cost["num_examples"]}
        assert taken == set([*fast, *slow][:2])
        assert sorted(one["client_id"] for one in line["failures"]) == sorted([*fast, *slow][2:])
        assert {one["reason"] for one in line["failures"]} == {"surplus"}


def test_clients_come_and_leave_by_the_clock(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("client,from,to\n0,10,\n1,10,10.05\n2,10,10.01\n2,10.01,99\n")
    done = run(tmp_path / "run", *MANY, f"fleet.availability={trace}", "num_rounds=2")
    first, second = done.rounds
    assert first["cohort"] == [0, 1, 2]
    assert first["simulated"]["clients"][0]["started_s"] == 10
    assert done.failures == [(1, 1, "left")]
    assert second["cohort"] == [0, 2]
    assert second["absent"] == {"unavailable": [1, 3, 4, 5, 6, 7]}


def test_measured_steps_replace_flops(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"step_macs": [1e3, 1e12], "step_s": [2.0, 2.0]}))
    measured = ONE.replace("watts: 7", f"profile: {profile}")
    done = run(tmp_path / "run", *PLAIN, measured, "fleet.clock=virtual", "num_rounds=1")
    seconds = [time["training_s"] for time in done.rounds[0]["simulated"]["clients"]]
    assert seconds == [2.0 * 3] * 4  # 20 examples in batches of 8
    profile.write_text("{}")
    with pytest.raises(DataError, match=r"needs the device.s .*profile\.json, which cannot be read"):
        run(tmp_path / "other", *PLAIN, measured, "fleet.clock=virtual")


CLAIMS = {
    "operations without end": (attacks.metric("pruning-macs", 1.7e308), "metric pruning-macs is 1.7e+308"),
    "a round to come": (attacks.config("update", "server-round", 9), "the update is of round 9"),
    "another client's update": (attacks.config("update", "client-id", 0), "says it is of client 0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("rounds", [(), ("rounds=asynchronous", "rounds.buffer_size=2")], ids=["synchronous", "async"])
def test_no_claim_stops_the_clock_or_makes_an_update_younger(
    claim: str, rounds: tuple[str, ...], tmp_path: Path
) -> None:
    attack, words = CLAIMS[claim]
    done = run(tmp_path, *MANY, *rounds, app=attacks.attacked(attack, (1, 4)))
    assert {(client_id, reason) for _, client_id, reason in done.failures} <= {(1, "rejected"), (4, "rejected")}
    assert done.failures
    assert all(words in failure["message"] for line in done.rounds for failure in line["failures"])
    assert done.rounds[-1]["simulated"]["since_start_s"] < 1e3


# ---- asynchronous
def test_the_buffer_is_that_of_the_naive_loop(once: Once) -> None:
    done = once(*BUFFERED)
    seconds = [0.0] * 8
    for line in done.rounds:
        for time in line["simulated"]["clients"]:
            seconds[time["client_id"]] = time["download_s"] + time["training_s"] + time["upload_s"]
    known = {
        time["device"]: seconds[time["client_id"]] for line in done.rounds for time in line["simulated"]["clients"]
    }
    kinds = federation_of(compose(BUFFERED))
    names = tier_names(kinds.config.fleet, 8, kinds.config.seed)
    expected, steps = fedbuff.run(done.config, [known[names[i]] for i in range(8)], train_locally)
    found = [
        sorted((time["client_id"], time["staleness"]) for time in line["simulated"]["clients"]) for line in done.rounds
    ]
    assert found == steps
    assert max(staleness for step in steps for _, staleness in step) > 1
    for name, values in done.tensors.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-6)


VARIANTS = {
    "weights": (),
    "plan": ("strategy=fedlp_plan", "strategy.unit_selection=client", "upload=int8", "upload.entropy_coding=true"),
    "heads": ("strategy=fedlp_hetero", "upload.values=deltas", "upload.error_feedback=true", "upload=int8"),
    "failures": ("strategy=heterofl", "fleet.dropout=0.3", "rounds.deadline_s=0.6", "fleet.availability=0.7"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if i else []) for i, n in enumerate(VARIANTS)]
)
def test_a_run_in_pieces_ends_like_one_in_one_piece(name: str, once: Once, tmp_path: Path) -> None:
    options = (*BUFFERED, *VARIANTS[name])
    folder = tmp_path / "run"
    shutil.copytree(run(tmp_path / "half", *options, "num_rounds=3").path, folder)
    assert_same(go_on(folder, 6), once(*options))


@pytest.mark.slow
@pytest.mark.parametrize("values", ["weights", "deltas"])
def test_stale_variances_stay_positive(values: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A discounted difference from an older, larger variance would take the current one below 0."""
    buffered = (*TINY_CNN, *BUFFERED[len(TINY) :], "num_rounds=12", f"upload.values={values}")
    done = run(tmp_path, *buffered)
    assert done.failures == []
    assert "is undone" not in caplog.text
    assert max(time["staleness"] for line in done.rounds for time in line["simulated"]["clients"]) > 1
    assert all(bool((x >= 0).all()) for name, x in done.tensors.items() if name.endswith("running_var"))


def test_no_client_trains_twice_at_once_or_in_a_step(once: Once) -> None:
    done = once(*BUFFERED)
    parts: dict[int, list[tuple[float, float]]] = {}
    for line in done.rounds:
        assert len({*line["cohort"]}) == len(line["simulated"]["clients"]) == 2
        for time in line["simulated"]["clients"]:
            ends = time["started_s"] + time["download_s"] + time["training_s"] + time["upload_s"]
            parts.setdefault(time["client_id"], []).append((time["started_s"], ends))
    for spans in parts.values():
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_with_everyone_late_the_run_ends_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="most of them late"):
        run(tmp_path, *BUFFERED, "rounds.deadline_s=0.001", "num_rounds=2")
    assert [line["cohort"] for line in read(tmp_path).rounds] == [[*range(8)]] * 2


def test_workers_do_not_matter(once: Once, tmp_path: Path) -> None:
    other = run(tmp_path, *BUFFERED, "simulation.workers=1")
    assert (other.model, other.untimed) == (once(*BUFFERED).model, once(*BUFFERED).untimed)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["fleet.clock=virtual"], "needs device classes"),
        (["fleet.clock=sundial"], "one of wall, virtual"),
        (["rounds.deadline_s=5"], "set fleet.clock=virtual too"),
        (["rounds.buffer_size=5", "fleet=mixed", "fleet.clock=virtual"], "null with rounds=synchronous"),
        (["rounds=asynchronous", "fleet=mixed", "fleet.clock=virtual", "rounds.buffer_size=99"], "num_clients=20"),
        (["rounds=asynchronous", "fleet=mixed", "fleet.clock=virtual", "fleet.extra_clients=1"], "extra_clients=0"),
        (["rounds=asynchronous", "fleet=mixed", "fleet.clock=virtual", "privacy=central_dp"], "privacy=none or local"),
        (["fleet=mixed", "fleet.clock=virtual", "privacy=secagg"], "no phases of privacy=secagg"),
        (["fleet=mixed", "fleet.clock=virtual", "fleet.devices.phone.watts=0"], "finite number above 0"),
        (
            ["fleet=mixed", "fleet.clock=virtual", "fleet.availability=a.csv", "fleet.round_s=5"],
            "seconds of that clock",
        ),
    ],
)
def test_wrong_options_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        federation_of(compose(overrides))
