"""Callbacks and the best model in whole runs, on the local engine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fedlp
from fedlp.errors import ConfigError
from fedlp.federation.server.callbacks import EarlyStopping
from fedlp.federation.server.checkpoint import ServerState
from fedlp.types import RoundRecord
from tests.integration.running import TINY, Call, Finished, assert_refused, read

Once = Callable[..., Finished]
OWN = """
seen = []


def stop_at(record, state, last=2):
    seen.append((record.server_round, state.server_round, sorted(record.metrics)))
    return record.server_round == last


def broken(record, state):
    raise KeyError("nothing")


def odd(record, state):
    return "yes"
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "watching.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "watching", raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("own")
def test_a_callback_of_ones_own_ends_a_run(call: Call, once: Once, tmp_path: Path) -> None:
    code, _, errors = call(*TINY, "num_rounds=4", "callbacks=[watching:stop_at]", "hydra.run.dir=run")
    assert code == 0, errors
    assert "fedlp: watching:stop_at ended the run after round 2 of 4\n" in errors
    done, two = read(tmp_path / "run"), once(*TINY)
    assert done.model == two.model
    assert done.manifest["stopped_by"] == "watching:stop_at"
    assert sys.modules["watching"].seen == [(i, i, ["accuracy", "loss", "train_loss"]) for i in (1, 2)]
    code, _, errors = call("resume=run", "num_rounds=5")  # the run stopped at a checkpoint
    assert code == 0, errors
    assert len(read(tmp_path / "run").rounds) == 5
    options = "callbacks=[{name:watching:stop_at,last:1}]"
    assert call(*TINY, options.replace("watching:stop_at", "'watching:stop_at'"), "hydra.run.dir=one")[0] == 0
    assert len(read(tmp_path / "one").rounds) == 1


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("callback", "words"),
    [
        ("watching:broken", r"callback watching:broken failed in round 1: KeyError: 'nothing'; .* fedlp resume="),
        ("watching:odd", "callback watching:odd returned a str; it must return True to end the run, or nothing"),
        ("watching:absent", "watching has no absent"),
        ("early_stoping", r"there is no callback early_stoping; did you mean early_stopping\?"),
        ("{name:early_stopping,metric:bleu}", "bleu is no metric of this run|bleu"),
    ],
)
def test_a_callback_that_does_not_work(callback: str, words: str, call: Call) -> None:
    code, _, errors = call(*TINY, "num_rounds=1", f"callbacks=[{callback}]")
    last = errors.splitlines()[-1] + "\n"
    assert_refused((code, "", last), words)


def test_early_stopping_and_resume(call: Call, tmp_path: Path) -> None:
    stop = "callbacks=[{name:early_stopping,patience:1,min_delta:0.9}]"  # nothing improves that much
    code, _, errors = call(*TINY, "num_rounds=5", stop, "checkpoint_every=10", "hydra.run.dir=run")
    assert code == 0, errors
    before = read(tmp_path / "run")
    assert len(before.rounds) == 2
    assert (tmp_path / "run" / "checkpoint" / "round-000002.json").is_file()
    code, _, errors = call("resume=run", "num_rounds=6")  # it has waited already
    assert code == 0, errors
    after = read(tmp_path / "run")
    assert (after.untimed, after.model) == (before.untimed, before.model)


def test_the_best_model_stays_beside_the_last(call: Call, tmp_path: Path) -> None:
    code, _, errors = call(*TINY, "num_rounds=3", "keep_best=accuracy", "local.lr=0.1", "hydra.run.dir=run")
    assert code == 0, errors
    done = read(tmp_path / "run")
    values = [line["metrics"]["accuracy"] for line in done.rounds]
    best = values.index(max(values)) + 1
    assert done.manifest["best"] == {"metric": "accuracy", "value": max(values), "server_round": best}
    kept = load_file(tmp_path / "run" / "model-best.safetensors")
    assert kept.keys() == done.tensors.keys()
    code, _, errors = call(*TINY, "local.lr=0.1", f"num_rounds={best}", "hydra.run.dir=short")
    assert code == 0, errors
    short = read(tmp_path / "short")
    if len(short.rounds) == best:
        assert all(torch.equal(tensor, kept[name]) for name, tensor in short.tensors.items())


def test_the_best_model_of_a_resumed_run(call: Call, once: Once, tmp_path: Path) -> None:
    shutil.copytree(once(*TINY, "keep_best=train_loss").path, tmp_path / "run")
    before = read(tmp_path / "run")
    code, _, errors = call("resume=run", "num_rounds=3")
    assert code == 0, errors
    values = [line["metrics"]["train_loss"] for line in read(tmp_path / "run").rounds]
    assert before.manifest["best"]["value"] == min(values[:2])
    assert read(tmp_path / "run").manifest["best"]["value"] == min(values)


def test_callbacks_as_objects(tmp_path: Path) -> None:
    x, y = torch.randn(120, 4), torch.randint(2, (120,))
    rounds: list[int] = []

    def note(record: RoundRecord, state: ServerState) -> None:
        rounds.append(record.server_round)

    result = fedlp.simulate(
        torch.nn.Sequential(torch.nn.Linear(4, 2)),
        (x, y),
        clients=3,
        rounds=5,
        strategy="fedavg",
        callbacks=[note, lambda record, state: record.server_round == 3, EarlyStopping(patience=4)],
        keep_best="accuracy",
        out=tmp_path / "run",
    )
    assert rounds == [1, 2, 3]
    assert result.manifest["stopped_by"] == "_lambda_"
    assert result.manifest["config"]["callbacks"][2]["patience"] == 4
    assert result.manifest["best"]["value"] == max(line["metrics"]["accuracy"] for line in result.rounds)
    with pytest.raises(ConfigError, match="a callback is a int; give a function, an object or a name"):
        fedlp.simulate(torch.nn.Linear(4, 2), (x, y), clients=3, callbacks=[3])


def test_a_best_of_nothing_is_refused(call: Call) -> None:
    words = "keep_best=perplexity is no metric of this run; choose one of accuracy, loss, train_loss"
    assert_refused(call(*TINY, "keep_best=perplexity"), words)
    assert_refused(call(*TINY, "objective=bleu"), "objective=bleu is no metric of this run")


def test_options_of_training_together(call: Call, tmp_path: Path) -> None:
    training = (
        *("local.precision=bfloat16", "local.proximal=0.01", "local.schedule={name:warmup,rounds:2}"),
        *("task=classification", "task.class_weights=balanced", "task.label_smoothing=0.1"),
        *("keep_best=accuracy", "callbacks=[{name:early_stopping,patience:2,min_delta:0.5}]", "server_optimizer=yogi"),
    )
    code, _, errors = call(*TINY, *training, "num_rounds=9", "hydra.run.dir=run")
    assert code == 0, errors
    done = read(tmp_path / "run")
    assert done.failures == []
    assert 3 <= len(done.rounds) < 9
    assert (tmp_path / "run" / "model-best.safetensors").is_file()
