"""Whole runs in which clients come and go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Message

from fedlp.apps.runs import federation_of
from fedlp.config import compose
from fedlp.errors import ConfigError
from fedlp.federation.wire.messages import CAPABILITIES
from fedlp.report import load_run
from fedlp.simulation.local import LocalGrid
from tests.integration.running import TINY, Finished, run

MANY = (*TINY, "strategy=fedavg", "num_clients=8", "clients_per_round=4", "num_rounds=4")


def test_only_clients_that_are_there_are_sampled(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("client,from,to\n0,1,2\n1,1,4\n2,3,3\n")
    done = run(tmp_path / "run", *MANY, f"fleet.availability={trace}")
    assert [line["cohort"] for line in done.rounds] == [[0, 1], [0, 1], [1, 2], [1]]
    assert done.rounds[3]["absent"] == {"unavailable": [0, 2, 3, 4, 5, 6, 7]}
    assert load_run(done.path).rounds[3].absent == {"unavailable": (0, 2, 3, 4, 5, 6, 7)}
    assert done.failures == []


def test_a_round_with_nobody_there_leaves_the_model(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("client,from,to\n0,2,2\n")
    done = run(tmp_path / "run", *MANY, f"fleet.availability={trace}", "num_rounds=3")
    assert [line["cohort"] for line in done.rounds] == [[], [0], []]
    loss = [line["metrics"]["loss"] for line in done.rounds]
    assert loss[1] == loss[2] != loss[0]


def test_drop_outs_are_named_cost_their_download_and_count_as_failures(once: Callable[..., Finished]) -> None:
    done = once(*MANY, "fleet.dropout=0.4")
    dropped = [(number, client_id) for number, client_id, reason in done.failures if reason == "dropped_out"]
    assert 1 <= len(dropped) == len(done.failures) <= 12
    for line in done.rounds:
        assert [cost["client_id"] for cost in sorted(line["clients"], key=lambda cost: cost["client_id"])] == line[
            "cohort"
        ]
        for cost in line["clients"]:
            lost = (line["server_round"], cost["client_id"]) in dropped
            assert (cost["bytes_up"] == cost["num_examples"] == cost["macs"] == 0) == lost
            assert cost["bytes_down"] > 0
    assert done.manifest["totals"]["failures"] == len(dropped)


def test_of_extra_clients_the_first_answers_are_taken(once: Callable[..., Finished]) -> None:
    done = once(*MANY, "fleet.extra_clients=2")
    for line in done.rounds:
        assert len(line["cohort"]) == 6
        assert sum(cost["num_examples"] > 0 for cost in line["clients"]) == 4
    assert {reason for _, _, reason in done.failures} == {"surplus"}
    assert len(done.failures) == 8
    last = {
        tuple(sorted(cost["client_id"] for cost in line["clients"] if not cost["bytes_up"])) for line in done.rounds
    }
    assert len(last) > 1  # not always the same clients


def test_the_same_seed_gives_the_same_bytes_and_goes_on_the_same(tmp_path: Path, once: Callable[..., Finished]) -> None:
    comes_and_goes = (*MANY, "fleet.availability=0.7", "fleet.dropout=0.2", "fleet.extra_clients=2")
    whole = once(*comes_and_goes)
    other = run(tmp_path / "other", *comes_and_goes, "simulation.workers=1")
    assert (other.model, other.untimed) == (whole.model, whole.untimed)
    half = run(tmp_path / "half", *comes_and_goes, "num_rounds=2")
    assert half.untimed == whole.untimed[:2]
    assert whole.model != once(*MANY).model


def test_without_these_options_nothing_changes(once: Callable[..., Finished]) -> None:
    plain = once(*MANY)
    assert plain.model == once(*MANY, "fleet.availability=1.0", "fleet.dropout=0", "fleet.extra_clients=0").model
    assert all("absent" not in line for line in plain.rounds)


def test_clients_without_data_are_counted(once: Callable[..., Finished]) -> None:
    skewed = (
        "partition=dirichlet",
        "partition.alpha=0.05",
        "partition.min_examples=0",
        "dataset.max_train_examples=40",
    )
    done = once(*MANY, *skewed)
    idle = done.rounds[0]["absent"]["no_data"]
    assert idle
    assert all(not {*line["cohort"]} & {*idle} for line in done.rounds)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["fleet.availability=0"], r"in \(0, 1\]"),
        (["fleet.availability=2"], r"in \(0, 1\]"),
        (["fleet.round_s=60"], "set fleet.availability=FILE too"),
        (["fleet.round_s=0", "fleet.availability=trace.csv"], "seconds above 0"),
        (["fleet.dropout=1"], r"in \[0, 1\)"),
        (["fleet.extra_clients=-1"], "at least 0"),
        (["fleet.extra_clients=11"], "num_clients - clients_per_round = 10"),
        (
            ["federated=true", "model=fedlp_cnn", "dataset=digits", "sparsity=0.3", "fleet.dropout=0.1"],
            "one cohort is asked",
        ),
    ],
)
def test_wrong_options_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        federation_of(compose(overrides))


def test_the_local_engine_knows_the_profiles_that_its_clients_would_send(
    tmp_path: Path, once: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (*MANY, "dataset.client_test_fraction=0.3", "evaluation=both")
    known, sent = once(*own), list[str]()
    number = LocalGrid._number

    def count(self: LocalGrid, message: Message) -> int:
        sent.append(message.metadata.message_type)
        return number(self, message)

    monkeypatch.setattr(LocalGrid, "_number", count)
    run(tmp_path / "again", *own)
    assert sent
    assert CAPABILITIES not in sent
    monkeypatch.setattr(LocalGrid, "profiles", lambda self: {})
    asked = run(tmp_path / "asked", *own)
    assert sent.count(CAPABILITIES) == 8
    assert (asked.model, asked.untimed) == (known.model, known.untimed)
