"""A tracker of the user's own, in a file of theirs, follows a run on the local engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.integration.running import TINY, Call, read

OWN = '''
import json
from dataclasses import dataclass


@dataclass
class Mine:
    """Lines of a file."""

    file: str = "mine.jsonl"

    def begin(self, config, run_dir):
        self.path = run_dir / self.file
        self._write(config["num_rounds"])

    def round(self, record):
        if self.file == "broken":
            raise RuntimeError("no room")
        if self.file == "exit":
            raise SystemExit("no licence")
        self._write([record.server_round, record.metrics["accuracy"], record.clients[0].train_loss])

    def end(self, manifest):
        self._write(sorted(manifest))

    def _write(self, value):
        with self.path.open("a") as file:
            file.write(json.dumps(value) + "\\n")
'''


def test_a_tracker_of_ones_own(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "follower.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "follower", raising=False)
    code, _, errors = call(*TINY, "tracker=follower:Mine", "tracker.file=lines", "hydra.run.dir=run")
    assert code == 0, errors
    first, *rounds, last = [json.loads(line) for line in (tmp_path / "run" / "lines").read_text().splitlines()]
    run = read(tmp_path / "run")
    assert first == 2
    assert rounds == [
        [line["server_round"], line["metrics"]["accuracy"], line["clients"][0]["train_loss"]] for line in run.rounds
    ]
    assert all(loss > 0 for _, _, loss in rounds)
    assert last == sorted(run.manifest)

    code, _, errors = call(*TINY, "tracker=follower:Mine", "tracker.file=broken", "hydra.run.dir=other")
    assert code == 0
    assert errors.count("tracker=follower:Mine failed in round (no room); the run goes on without it\n") == 1
    assert read(tmp_path / "other").model == run.model

    code, _, errors = call(*TINY, "tracker=follower:Mine", "tracker.file=exit", "hydra.run.dir=third")
    assert code == 0
    assert errors.count("tracker=follower:Mine failed in round (no licence); the run goes on without it\n") == 1
    assert read(tmp_path / "third").model == run.model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the trackers' own packages
@pytest.mark.parametrize(
    ("tracker", "package", "pattern"),
    [
        (["tracker=tensorboard"], "tensorboard", "**/events.out.tfevents.*"),
        (["tracker=mlflow"], "mlflow", "mlruns/**/metrics/accuracy"),
        (["tracker=wandb", "tracker.mode=offline"], "wandb", "wandb/offline-run-*/*.wandb"),
    ],
)
def test_a_run_has_its_tracker(
    tracker: list[str], package: str, pattern: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    clients = ("evaluation=both", "dataset.client_test_fraction=0.25")
    code, _, errors = call(*TINY, *tracker, *clients, "hydra.run.dir=run")
    assert code == 0, errors
    assert "the run goes on without it" not in errors
    assert list((tmp_path / "run").glob(pattern))
    assert (tmp_path / "run" / "report" / "report.html").is_file() or package == "tensorboard"
