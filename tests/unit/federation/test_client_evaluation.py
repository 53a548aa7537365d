"""Evaluation on clients: test splits, sums from outside, the distribution over clients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedlp.data.examples import DataInfo, Examples
from fedlp.errors import DataError, ProtocolError
from fedlp.federation.client.shards import Shards
from fedlp.federation.server.client_evaluation import (
    read_metrics,
    sum_lengths,
    summarize_clients,
    total_metrics,
)
from fedlp.federation.wire import evaluation_messages
from fedlp.tasks import make_task
from fedlp.types import ClientEvaluation

LENGTHS = {"loss": 0, "count": 0, "accuracy.correct": 0, "accuracy.count": 0}
GOOD = {"loss": 8.0, "count": 4.0, "accuracy.correct": 3.0, "accuracy.count": 4.0}


def examples(count: int) -> Examples:
    return Examples(torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count) % 2, None)


def rows(found: Examples) -> set[int]:
    return {int(value) for value in found.inputs[:, 0]}


def evaluations(*accuracies: float, sizes: tuple[int, ...] = (), tiers: tuple[str, ...] = ()) -> list[ClientEvaluation]:
    return [
        ClientEvaluation(
            i, tiers[i] if tiers else "1", sizes[i] if sizes else 1, {"loss": 1 - value, "accuracy": value}
        )
        for i, value in enumerate(accuracies)
    ]


# ---- splits
def test_a_client_holds_out_its_share_of_every_class_and_trains_on_the_rest() -> None:
    shards = Shards(examples(100), [np.arange(0, 40), np.arange(40, 100)], test_fraction=0.25, seed=3)
    held_out, kept = shards.test_of(1), shards.of(1)
    assert rows(held_out) | rows(kept) == set(range(40, 100))
    assert rows(held_out) & rows(kept) == set()
    assert shards.size(1) == len(kept) == 45
    assert abs(2 * int(held_out.targets.sum()) - len(held_out)) <= 1


def test_the_split_depends_on_seed_and_client_alone() -> None:
    part = np.arange(40)
    first = Shards(examples(60), [part, np.arange(40, 60)], 0.25, seed=3)
    alone = Shards(examples(60), {0: part}, 0.25, seed=3)
    assert rows(first.test_of(0)) == rows(alone.test_of(0))
    assert rows(first.test_of(0)) != rows(Shards(examples(60), [part], 0.25, seed=4).test_of(0))
    assert rows(first.test_of(0)) != rows(Shards(examples(60), {1: part}, 0.25, seed=3).test_of(1))


def test_nothing_is_held_out_without_a_fraction_or_of_one_example() -> None:
    assert rows(Shards(examples(4), [np.arange(4)]).of(0)) == {0, 1, 2, 3}
    lonely = Shards(examples(4), [np.array([2])], test_fraction=0.5)
    assert rows(lonely.of(0)) == {2}
    with pytest.raises(DataError, match="client 0 holds out no example"):
        lonely.test_of(0)
    with pytest.raises(DataError, match="no client 7"):
        lonely.size(7)


# ---- sums from outside
def test_sums_come_back_as_they_went() -> None:
    lengths = LENGTHS | {"macro_f1.correct": 3}
    sums = GOOD | {"macro_f1.correct": [1.0, 2.0, 0.0]}
    assert evaluation_messages.decode_client_sums(
        evaluation_messages.encode_client_sums(sums, 4), lengths, "client 2"
    ) == (sums, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": math.nan}, "loss holds nan"),
        ({"loss": math.inf}, "loss holds inf"),
        ({"accuracy.correct": 1e300}, "accuracy.correct holds"),
        ({"count": 0.0}, "of 0.0 predictions"),
        ({"count": [4.0]}, "count is"),
        ({"extra": 1.0}, "extra is unexpected"),
        ({"num-examples": -1}, "num-examples"),
        ({"num-examples": 10**12}, "num-examples"),
        ({"num-examples": 5}, r"num-examples is 5, not a count in \[1, 4\]"),
        ({"count": 5.0}, r"of 5\.0 predictions"),
        ({"accuracy.count": -4.0, "accuracy.correct": -3.0}, r"accuracy\.count is -4\.0, a negative count"),
    ],
)
def test_sums_out_of_range_are_rejected(change: dict[str, float], words: str) -> None:
    content = evaluation_messages.encode_client_sums(GOOD, 4)
    for name, value in change.items():
        content.metric_records["metrics"][name] = value
    with pytest.raises(ProtocolError, match=f"client 2.*{words}"):
        evaluation_messages.decode_client_sums(content, LENGTHS, "client 2", most_examples=4, most_predictions=1.0)


def test_missing_sums_are_rejected() -> None:
    content = evaluation_messages.encode_client_sums({"loss": 1.0, "count": 1.0}, 4)
    with pytest.raises(ProtocolError, match=r"accuracy\.correct is missing"):
        evaluation_messages.decode_client_sums(content, LENGTHS, "client 2")


def test_sums_that_give_an_impossible_metric_are_rejected() -> None:
    task = make_task("classification")
    assert read_metrics(task, dict(GOOD), "client 2") == {"accuracy": 0.75, "loss": 2.0}
    with pytest.raises(ProtocolError, match=r"client 2: its accuracy is 1\.25, outside \[0, 1\]"):
        read_metrics(task, GOOD | {"accuracy.correct": 5.0}, "client 2")
    with pytest.raises(ProtocolError, match=r"client 2: its loss is -2, outside \[0, inf\]"):
        read_metrics(task, GOOD | {"loss": -8.0}, "client 2")
    with pytest.raises(ProtocolError, match="give no metrics"):
        read_metrics(task, GOOD | {"accuracy.count": 0.0}, "client 2")


def test_the_sums_of_a_task_are_known_before_anybody_answers() -> None:
    task = make_task("classification", metrics=("accuracy", "macro_f1"))
    info = DataInfo("rows", task, (5,), 3, None, None)
    lengths = sum_lengths(torch.nn.Linear(5, 3), info)
    assert lengths["loss"] == lengths["count"] == lengths["accuracy.correct"] == 0
    assert {length for name, length in lengths.items() if name.startswith("macro_f1.")} == {3}


def test_a_total_that_gives_no_metric_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    """Each client's sums pass; together a hostile one's turn a ratio over."""
    task = make_task("classification", metrics=("macro_f1",))
    one = {"loss": 1.0, "count": 1.0, "macro_f1.right": [1.0], "macro_f1.predicted": [1.0], "macro_f1.true": [1.0]}
    other = one | {"macro_f1.right": [0.0], "macro_f1.predicted": [-1.9]}
    assert total_metrics(task, [one, one]) == {"macro_f1": 1.0, "loss": 1.0}
    for sums in (one, other):
        read_metrics(task, sums, "client 2")
    assert total_metrics(task, [one, other]) == {}
    assert "no metrics of clients: the sum of all clients: its macro_f1 is 1.8" in caplog.text


def test_the_most_predictions_of_an_example() -> None:
    tokens = DataInfo("text", make_task("causal_lm"), (12,), 30, None, None)
    examples_of_two = tokens.task.draw_examples(tokens, 2, np.random.default_rng(0))
    most = tokens.task.most_predictions(tokens)
    assert most == tokens.task.count(examples_of_two.inputs, examples_of_two.targets) / 2 == 12
    rows_ = DataInfo("rows", make_task("regression"), (5,), 3, None, None)
    assert rows_.task.most_predictions(rows_) == 1


# ---- the distribution
def test_the_distribution_over_clients() -> None:
    values = [i / 20 for i in range(20)]
    found = summarize_clients(evaluations(*values, sizes=(1,) * 19 + (21,)), {"loss": False, "accuracy": True})
    assert found["client_accuracy"] == pytest.approx((sum(values[:19]) + 21 * values[19]) / 40)
    assert found["client_accuracy_mean"] == pytest.approx(np.mean(values))
    assert found["client_accuracy_median"] == pytest.approx(np.median(values))
    assert found["client_accuracy_worst"] == pytest.approx((values[0] + values[1]) / 2)
    assert found["client_accuracy_best"] == pytest.approx((values[18] + values[19]) / 2)
    assert found["client_loss_worst"] == pytest.approx(1 - (values[0] + values[1]) / 2)
    assert not any("tier" in name for name in found)


def test_tiers_and_values_that_are_not_finite() -> None:
    some = evaluations(0.2, 0.4, 0.9, math.nan, sizes=(1, 3, 2, 9), tiers=("small", "small", "large", "large"))
    found = summarize_clients(some, {"accuracy": True})
    assert found["client_accuracy_tier_small"] == pytest.approx((0.2 + 3 * 0.4) / 4)
    assert found["client_accuracy_tier_large"] == pytest.approx(0.9)
    assert found["client_accuracy_mean"] == pytest.approx(0.5)
