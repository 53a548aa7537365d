"""Evaluation on clients in whole runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from fedlp.apps import runs as assembly
from fedlp.apps.federate import Federation
from fedlp.config import compose, to_yaml
from fedlp.errors import ConfigError
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.report import load_run
from fedlp.training.batches import prepare_inputs
from tests.integration.running import TINY, Finished, read, run

HOLDS = "dataset.client_test_fraction=0.25"
TIERS = ("fleet=tiers", "fleet.fractions=[1.0,0.5]", "strategy=heterofl")


def test_every_client_measures_the_model_on_its_own_test_examples(once: Callable[..., Finished]) -> None:
    done = once(*TINY, "evaluation=both", HOLDS)
    runtime = assembly.make_runtime(to_yaml(done.config), str(done.path / "clients"))
    model = runtime.submodels.skeleton().eval()
    model.load_state_dict(done.tensors)
    last = done.rounds[-1]
    assert [one["client_id"] for one in last["evaluations"]] == list(range(6))
    for one in last["evaluations"]:
        held_out = runtime.shards.test_of(one["client_id"])
        outputs = model(prepare_inputs(held_out.inputs, runtime.info, torch.device("cpu")))
        right = (outputs.argmax(dim=1) == held_out.targets).float().mean()
        assert one["num_examples"] == len(held_out) == 5
        assert one["metrics"]["accuracy"] == pytest.approx(float(right))
    values = [one["metrics"]["accuracy"] for one in last["evaluations"]]
    assert last["metrics"]["client_accuracy_worst"] == pytest.approx(min(values))
    assert last["metrics"]["client_accuracy_mean"] == pytest.approx(sum(values) / 6)
    assert {"accuracy", "loss", "client_loss_median"} <= last["metrics"].keys()


def test_asking_clients_changes_no_byte_of_the_model(once: Callable[..., Finished]) -> None:
    assert once(*TINY, "evaluation=both", HOLDS).model == once(*TINY, HOLDS).model
    assert "evaluations" not in once(*TINY, HOLDS).rounds[0]


def test_clients_alone_and_some_of_them(once: Callable[..., Finished]) -> None:
    done = once(*TINY, "evaluation=clients", "evaluation.clients=2", HOLDS)
    asked = [tuple(one["client_id"] for one in line["evaluations"]) for line in done.rounds]
    assert all(len(ids) == 2 for ids in asked)
    assert "accuracy" not in done.manifest["final_metrics"]
    assert "client_accuracy_worst" in done.manifest["final_metrics"]
    assert [len(record.evaluations) for record in load_run(done.path).rounds] == [2, 2]


def test_tiers_are_told_apart_on_clients_and_on_the_server(once: Callable[..., Finished]) -> None:
    done = once(*TINY, *TIERS, "evaluation=both", "evaluation.tiers=true", HOLDS)
    last = done.rounds[-1]
    assert {one["tier"] for one in last["evaluations"]} == {"1", "0.5"}
    assert {"client_accuracy_tier_1", "client_accuracy_tier_0.5", "tier_0.5_accuracy"} <= last["metrics"].keys()
    assert last["metrics"]["tier_1_loss"] == last["metrics"]["loss"]
    assert last["metrics"]["tier_0.5_loss"] != last["metrics"]["loss"]
    assert not any(name.startswith("tier_") for name in done.rounds[0]["metrics"])


@pytest.mark.slow
def test_each_tier_has_batch_norm_statistics_of_its_own(once: Callable[..., Finished]) -> None:
    small = (
        *(option for option in TINY if not option.startswith("model")),
        "num_clients=2",
        "clients_per_round=2",
        "dataset.max_train_examples=40",
    )
    batch_norms = (*small, "model=cifar_resnet", "model.name=resnet20")
    shape = (*batch_norms, "num_rounds=1", *TIERS, HOLDS)
    done = once(*shape, "evaluation=both", "evaluation.tiers=true")
    assert done.config.aggregator.batch_norm == "auto"
    metrics = done.rounds[-1]["metrics"]
    assert metrics["tier_0.5_loss"] < 10
    assert done.model == once(*shape).model


def test_personal_heads_and_personal_steps(once: Callable[..., Finished]) -> None:
    hetero = (*TINY, "strategy=fedlp_hetero", "strategy.depths=2", "evaluation=clients", HOLDS, "local.lr=0.2")
    plain, stepped = once(*hetero), once(*hetero, "evaluation.personal_steps=20")
    assert plain.model == stepped.model
    before, after = (done.rounds[-1]["metrics"]["client_loss"] for done in (plain, stepped))
    assert after != before
    heads = RunDirectory(stepped.path).clients
    for path in (plain.path / "clients").rglob("*.safetensors"):
        assert (heads / path.relative_to(plain.path / "clients")).read_bytes() == path.read_bytes()


def test_with_privacy_only_sums_of_all_are_on_record(once: Callable[..., Finished]) -> None:
    done = once(*TINY, "strategy=fedavg", "privacy=local_dp", "privacy.seeded=true", "evaluation=clients", HOLDS)
    assert all("evaluations" not in line for line in done.rounds)
    assert set(done.rounds[-1]["metrics"]) == {"client_accuracy", "client_loss"}


def test_a_client_of_one_example_trains_and_is_counted_as_without_test_examples(tmp_path: Path) -> None:
    config = compose((*TINY, "clients_per_round=6", "num_rounds=1", "evaluation=both", HOLDS))
    parts = [np.array([0]), *np.array_split(np.arange(1, 120), 5)]
    Federation(config, parts=parts).run_locally(tmp_path / "run")
    done = read(tmp_path / "run")
    (line,) = done.rounds
    assert line["failures"] == []
    assert next(cost for cost in line["clients"] if cost["client_id"] == 0)["num_examples"] == 1
    assert line["absent"] == {"no_test_examples": [0]}
    assert [one["client_id"] for one in line["evaluations"]] == [1, 2, 3, 4, 5]
    assert load_run(done.path).rounds[0].absent == {"no_test_examples": (0,)}


def test_without_any_test_example_the_run_ends_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = compose((*TINY, "dataset.max_train_examples=6", "num_rounds=1", "evaluation=both", HOLDS))
    with caplog.at_level(logging.WARNING, "fedlp"):
        Federation(config).run_locally(tmp_path / "run")
    (line,) = read(tmp_path / "run").rounds
    assert "accuracy" in line["metrics"]
    assert line["absent"] == {"no_test_examples": [0, 1, 2, 3, 4, 5]}
    assert "none holds out an example" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "claim", [{"accuracy.correct": 1e6}, {"num-examples": 10**9, "count": 1e9, "accuracy.count": 1e9}, {"loss": -1e30}]
)
def test_a_client_that_reports_nonsense_is_named_and_left_out(claim: dict[str, float], tmp_path: Path) -> None:
    def app(message: Message, context: Context) -> Message:
        reply = assembly.client_app(message, context)
        if message.metadata.message_type == "evaluate.client" and context.node_config["partition-id"] == 1:
            reply.content.metric_records["metrics"].update(claim)
        return reply

    done = run(tmp_path, *TINY, "num_rounds=1", "evaluation=clients", HOLDS, app=app)
    assert done.failures == [(1, 1, "rejected")]
    assert [one["client_id"] for one in done.rounds[0]["evaluations"]] == [0, 2, 3, 4, 5]
    assert done.rounds[0]["metrics"]["client_accuracy_best"] <= 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluation=clients"], "dataset.client_test_fraction"),
        (
            ["evaluation=both", HOLDS, "federated=true", "model=fedlp_cnn", "dataset=digits", "sparsity=0.3"],
            "test set alone",
        ),
        (["evaluation=nobody"], "evaluation=nobody"),
        (["dataset.client_test_fraction=1"], r"in \[0, 1\)"),
        (["evaluation=clients", HOLDS, "evaluation.tiers=true"], "needs the server's test set"),
        (["evaluation.personal_steps=-1"], "at least 0"),
    ],
)
def test_wrong_options_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        assembly.federation_of(compose(overrides))
