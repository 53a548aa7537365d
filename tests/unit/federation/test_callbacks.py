"""Early stopping, the direction of metrics."""

from __future__ import annotations

import pytest

from fedlp.config import compose
from fedlp.errors import ConfigError
from fedlp.federation.server.callbacks import EarlyStopping, is_better
from fedlp.federation.server.checkpoint import ServerState
from fedlp.tasks import make_task
from fedlp.tasks.direction import larger_is_better
from fedlp.types import RoundRecord

STATE = ServerState(0, {})


def records(metric: str, *values: float | None) -> list[RoundRecord]:
    metrics = [{} if value is None else {metric: value} for value in values]
    return [RoundRecord(i, (), 0, 0, 0, 0, 0.0, {}, (), (), one, 0.0) for i, one in enumerate(metrics, start=1)]


def test_the_direction_of_a_metric() -> None:
    task = make_task("regression")
    assert not larger_is_better("rmse", task)
    assert larger_is_better("r2", task)
    assert not larger_is_better("train_loss", task)
    assert not larger_is_better("clients_rmse_worst", task)
    assert larger_is_better("accuracy")
    assert not larger_is_better("perplexity")
    with pytest.raises(ConfigError, match="accuracy is no metric of this run; choose one of rmse, mae, r2, loss"):
        larger_is_better("accuracy", task)


@pytest.mark.parametrize(
    ("metric", "values", "stops"),
    [
        ("accuracy", [0.1, 0.2, 0.2, 0.15, 0.3], [False, False, False, True, False]),
        ("loss", [3.0, 2.0, 2.5, float("nan"), 1.0], [False, False, False, True, False]),
        ("accuracy", [0.1, None, 0.0, None, 0.0], [False, False, False, False, True]),  # rounds without evaluation
    ],
)
def test_early_stopping_waits_for_so_many_evaluations(
    metric: str, values: list[float | None], stops: list[bool]
) -> None:
    callback = EarlyStopping(metric=metric, patience=2)
    assert [callback(record, STATE) for record in records(metric, *values)] == stops


def test_small_improvements_do_not_count() -> None:
    callback = EarlyStopping(patience=1, min_delta=0.1, task=make_task("classification"))
    assert [callback(record, STATE) for record in records("accuracy", 0.5, 0.55)] == [False, True]
    assert not is_better(0.6, 0.5, True, 0.2)


def test_a_stopped_run_remembers() -> None:
    done = records("accuracy", 0.5, 0.4, 0.3, 0.6)
    callback = EarlyStopping(metric="accuracy", patience=2)
    assert callback.recall(done[:3])
    callback = EarlyStopping(metric="accuracy", patience=2)
    assert not callback.recall(done[:2])
    assert callback(done[2], STATE)
    assert not EarlyStopping(metric="accuracy").recall([])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["callbacks=[3]"], "callbacks=.* must be a list of names"),
        (["callbacks=[{patience:3}]"], "callbacks=.* must be a list of names"),
    ],
)
def test_callbacks_that_cannot_be(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose(overrides)


def test_one_callback_needs_no_brackets() -> None:
    assert compose(["callbacks=early_stopping"]).callbacks == ["early_stopping"]
    assert compose(["callbacks={name:early_stopping,patience:2}"]).callbacks == [
        {"name": "early_stopping", "patience": 2}
    ]
