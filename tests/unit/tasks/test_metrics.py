"""Metrics: equal to scikit-learn's, and sums over parts give the value of the whole."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import Tensor

from fedlp.errors import ConfigError, DataError
from fedlp.tasks import add_sums
from fedlp.tasks.metrics import Metric, make_metrics

RNG = np.random.default_rng(0)
CLASSES, LOGITS = RNG.integers(0, 7, 60), RNG.standard_normal((60, 8))  # class 7 never occurs
LABELS, SCORES = RNG.integers(0, 2, (60, 3)), RNG.standard_normal((60, 3))
VALUES, GUESSES = RNG.standard_normal((60, 2)), RNG.standard_normal((60, 2))
GUESSED = LOGITS.argmax(axis=1)

CASES: dict[str, tuple[str, Any, Any, float]] = {
    "accuracy": ("accuracy", LOGITS, CLASSES, sklearn.metrics.accuracy_score(CLASSES, GUESSED)),
    "accuracy of labels": ("accuracy", SCORES, LABELS, float(np.mean((SCORES > 0) == LABELS))),
    "top_5": ("top_k", LOGITS, CLASSES, sklearn.metrics.top_k_accuracy_score(CLASSES, LOGITS, k=5, labels=range(8))),
    "macro_f1": ("macro_f1", LOGITS, CLASSES, sklearn.metrics.f1_score(CLASSES, GUESSED, average="macro")),
    "macro_f1 of labels": (
        "macro_f1",
        SCORES,
        LABELS,
        sklearn.metrics.f1_score(LABELS, SCORES > 0, average="macro"),
    ),
    "mae": ("mae", GUESSES, VALUES, sklearn.metrics.mean_absolute_error(VALUES, GUESSES)),
    "rmse": ("rmse", GUESSES, VALUES, math.sqrt(sklearn.metrics.mean_squared_error(VALUES, GUESSES))),
    "r2": ("r2", GUESSES, VALUES, sklearn.metrics.r2_score(VALUES, GUESSES)),
}


def sums_of(metric: Metric, outputs: Any, targets: Any) -> dict[str, Any]:
    found = metric.sums(torch.as_tensor(outputs), torch.as_tensor(targets))
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_metric_is_sklearns_and_its_sums_add_up(case: str) -> None:
    name, outputs, targets, expected = CASES[case]
    (metric,) = make_metrics((name,))
    whole = sums_of(metric, outputs, targets)
    assert metric.value(whole) == pytest.approx(expected, rel=1e-12)
    parts = [sums_of(metric, outputs[part], targets[part]) for part in (slice(0, 7), slice(7, 8), slice(8, 60))]
    assert metric.value(add_sums(parts)) == pytest.approx(expected, rel=1e-12)
    assert metric.larger_is_better == (name not in ("mae", "rmse"))


def test_perplexity_is_of_the_mean_loss() -> None:
    (metric,) = make_metrics(("perplexity",))
    assert metric.value({"loss": 6.0, "count": 3.0}) == pytest.approx(math.exp(2))
    assert metric.value({"loss": 1e6, "count": 1.0}) == math.inf
    assert not metric.larger_is_better


def test_classes_that_never_occur_and_equal_targets_have_no_part() -> None:
    macro, r2 = make_metrics(("macro_f1", "r2"))
    assert macro.value(sums_of(macro, np.eye(4)[[0, 1]], np.array([0, 1]))) == 1.0
    assert macro.value({"right": [0.0], "predicted": [0.0], "true": [0.0]}) == 0.0
    assert math.isnan(r2.value(sums_of(r2, np.zeros((3, 1)), np.ones((3, 1)))))


class Mine:
    """Share of first classes."""

    label, larger_is_better = "firsts", True

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"firsts": float((targets == 0).sum())}

    def value(self, sums: Any) -> float:
        return float(sums["firsts"] / sums["count"])


def test_a_metric_of_ones_own_is_found_and_one_without_the_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "their_metrics", sys.modules[__name__])
    (mine,) = make_metrics(("their_metrics:Mine",))
    assert mine.label == "firsts"
    with pytest.raises(ConfigError, match="metric=builtins:dict must have label, larger_is_better, sums and value"):
        make_metrics(("builtins:dict",))
    with pytest.raises(ConfigError, match="there is no metric acuracy; did you mean accuracy"):
        make_metrics(("acuracy",))
    with pytest.raises(ConfigError, match="there is another metric accuracy"):
        make_metrics(("accuracy", "accuracy"))


def test_sums_of_other_models_do_not_add_up() -> None:
    with pytest.raises(DataError, match=r"sums of macro_f1\.right do not fit each other"):
        add_sums([{"macro_f1.right": [1.0, 2.0]}, {"macro_f1.right": [1.0]}])
    with pytest.raises(DataError, match="do not fit"):
        add_sums([{"loss": 1.0}, {"loss": [1.0]}])
