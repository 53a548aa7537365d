"""Trackers: each real client writes a round where its own tools read it; a broken one is a warning."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlp.config import RunConfig, compose, to_plain
from fedlp.errors import ConfigError
from fedlp.report.trackers import GuardedTracker, tracking
from fedlp.report.trackers.values import distributions, flat, scalars
from fedlp.types import ClientCost, ClientFailure, RoundRecord

RECORD = RoundRecord(
    server_round=1,
    cohort=(0, 1, 2),
    bytes_up=30,
    bytes_down=60,
    params_up=3,
    params_down=6,
    macs=9.0,
    coverage={"conv1.0": 0.5},
    failures=(ClientFailure(2, "error", "lost"),),
    clients=(ClientCost(0, 5, 20, 10, 2, 1, 3.0, 0.7), ClientCost(1, 7, 20, 10, 2, 1, 3.0, 0.9)),
    metrics={"train_loss": 0.8, "accuracy": 0.25, "loss": float("nan")},
    wall_time_s=1.5,
)
MANIFEST = {"final_metrics": {"accuracy": 0.5}, "totals": {"rounds": 2}}


def follow(name: str, folder: Path, *options: str) -> None:
    """Follow a run of two rounds with one tracker; nothing is caught."""
    config = compose([f"tracker={name}", *options])
    tracker = config.tracker.make()
    folder.mkdir(exist_ok=True)
    for file in ("config.yaml", "manifest.json"):
        (folder / file).write_text("{}")
    tracker.begin(to_plain(config), folder)
    tracker.round(RECORD)
    tracker.round(replace(RECORD, server_round=2, metrics={"accuracy": 0.5}))
    tracker.end(MANIFEST)


def test_a_round_as_numbers() -> None:
    found = scalars(RECORD)
    assert found["metrics/accuracy"] == 0.25
    assert found["coverage/conv1.0"] == 0.5
    assert found["round/bytes_up"] == 30
    assert found["round/failures"] == 1
    assert "metrics/loss" not in found  # not finite
    assert distributions(RECORD)["clients/train_loss"] == [0.7, 0.9]
    assert distributions(RECORD)["clients/num_examples"] == [5, 7]
    assert not any("client_id" in name or "failures" in name for name in distributions(RECORD))
    assert flat({"a": {"b": 1}, "c": []}) == {"a.b": 1, "c": []}


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("metrics/accuracy")] == [(1, 0.25), (2, 0.5)]
    assert events.Histograms("clients/train_loss")[0].histogram_value.num == 2
    assert "config/text_summary" in events.Tags()["tensors"]


def test_tensorboard_forgets_rounds_that_are_done_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow("tensorboard", tmp_path)
    tracker = compose(["tracker=tensorboard"]).tracker.make()
    tracker.begin({}, tmp_path)
    tracker.round(replace(RECORD, server_round=2, metrics={"accuracy": 0.75}))
    tracker.end({})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("metrics/accuracy")] == [(1, 0.25), (2, 0.75)]


@pytest.mark.filterwarnings("ignore")  # of MLflow's own
def test_mlflow_has_parameters_and_metrics(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install mlflow-skinny")
    from mlflow.tracking import MlflowClient

    uri = (tmp_path / "store").as_uri()
    for _ in range(2):  # a resumed run goes on with its own MLflow run
        follow("mlflow", tmp_path, f"tracker.uri={uri}", "tracker.report=false", "local.lr=0.125")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("fedlp")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["local.lr"] == "0.125"
    assert run.data.metrics["metrics/accuracy"] == 0.5
    assert run.data.metrics["clients/train_loss/max"] == 0.9
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"config.yaml", "manifest.json"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of wandb's own
def test_wandb_offline_writes_into_the_run(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed: pip install wandb")
    follow("wandb", tmp_path, "tracker.mode=offline", "tracker.report=false")
    wandb.teardown()  # its own process writes the rest
    (data,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = data.read_bytes()
    assert b"metrics/accuracy" in content
    assert b"clients/train_loss/distribution" in content


def test_a_mode_that_wandb_does_not_have() -> None:
    with pytest.raises(ConfigError, match=r"tracker\.mode=loud is not allowed: it must be online, offline or disabled"):
        compose(["tracker=wandb", "tracker.mode=loud"])
    with pytest.raises(ConfigError, match=r"no option tracker\.uri with tracker=wandb"):
        compose(["tracker=wandb", "tracker.uri=x"])


class Broken:
    """Tracker that fails in one verb, and counts its calls."""

    def __init__(self, verb: str) -> None:
        self.verb, self.calls = verb, 0

    def _call(self, verb: str) -> None:
        self.calls += 1
        if verb == self.verb:
            raise OSError("the service is down")

    def begin(self, config: Mapping[str, Any], run_dir: Path) -> None:
        self._call("begin")

    def round(self, record: RoundRecord) -> None:
        self._call("round")

    def end(self, manifest: Mapping[str, Any]) -> None:
        self._call("end")


@pytest.mark.parametrize(("verb", "calls"), [("begin", 1), ("round", 2), ("end", 4)])
def test_a_broken_tracker_is_one_warning(
    verb: str, calls: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken(verb)
    with tracking("mine", lambda: broken, {}, tmp_path) as tracker:
        tracker.round(RECORD)
        tracker.round(RECORD)
    assert broken.calls == calls
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        f"tracker=mine failed in {verb} (the service is down); the run goes on without it"
    ]


def test_an_object_that_is_no_tracker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = GuardedTracker("mine", object)
    tracker.begin({}, tmp_path)
    tracker.round(RECORD)
    assert "must have begin(config, run_dir), round(record) and end(manifest)" in caplog.text


def test_a_tracker_hears_of_a_run_that_failed(tmp_path: Path) -> None:
    ends = []

    class Mine(Broken):
        def end(self, manifest: Mapping[str, Any]) -> None:
            ends.append(manifest)

    with pytest.raises(KeyboardInterrupt), tracking("mine", lambda: Mine(""), {}, tmp_path):
        raise KeyboardInterrupt
    assert ends == [{}]


def test_configs_without_a_tracker_have_none() -> None:
    assert RunConfig().tracker.name == "none"
