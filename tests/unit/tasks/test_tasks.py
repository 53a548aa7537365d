"""Tasks: the loss of each is the textbook's, sums are over predictions, options change only training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedlp.data.examples import IGNORE_INDEX, DataInfo, Examples
from fedlp.errors import ConfigError, DataError
from fedlp.tasks import Task, make_task, task_of

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
TABLE = DataInfo("table", "classification", (3,), 4, None, None)
LOGITS = torch.from_numpy(RNG.standard_normal((6, 4), dtype=np.float32))
CLASSES = torch.tensor([0, 3, 1, 1, 0, 1])
INPUTS = torch.zeros(6, 3)


def test_names_of_old_run_directories_are_still_read() -> None:
    assert type(make_task("language")) is type(make_task("causal_lm"))
    assert make_task("language") == make_task("causal_lm")
    assert task_of(TABLE) is task_of(replace(TABLE, name="other"))
    mine = make_task("classification", label_smoothing=0.1)
    assert task_of(replace(TABLE, task=mine)) is mine


def test_classification() -> None:
    task = task_of(TABLE)
    logs = LOGITS.double().log_softmax(dim=1)
    expected = -logs[torch.arange(6), CLASSES].sum()
    assert float(task.loss(LOGITS, INPUTS, CLASSES)) == pytest.approx(float(expected / 6), rel=1e-6)
    sums = task.sums(LOGITS, INPUTS, CLASSES)
    right = int((LOGITS.argmax(dim=1) == CLASSES).sum())
    assert sums == {
        "loss": pytest.approx(float(expected), rel=1e-6),
        "count": 6.0,
        "accuracy.correct": float(right),
        "accuracy.count": 6.0,
    }
    assert task.summarize(sums) == {"accuracy": right / 6, "loss": pytest.approx(float(expected) / 6, rel=1e-6)}
    with pytest.raises(DataError, match="nothing to evaluate on"):
        task.summarize({"loss": 0.0, "count": 0.0})


def test_smoothing_and_class_weights_change_training_only() -> None:
    plain, logs = make_task("classification"), LOGITS.log_softmax(dim=1)
    nll = -logs[torch.arange(6), CLASSES]
    smooth = make_task("classification", label_smoothing=0.2)
    expected = (0.8 * nll - 0.2 * logs.mean(dim=1)).mean()
    torch.testing.assert_close(smooth.loss(LOGITS, INPUTS, CLASSES), expected)
    weights = [1.0, 2.0, 3.0, 0.5]
    weighted = make_task("classification", class_weights=weights)
    each = torch.tensor(weights)[CLASSES]
    torch.testing.assert_close(weighted.loss(LOGITS, INPUTS, CLASSES), (each * nll).sum() / each.sum())
    balanced = make_task("classification", class_weights="balanced")
    criterion = balanced.criterion(Examples(INPUTS, CLASSES, None))
    each = torch.tensor([6 / (3 * 2), 6 / (3 * 3), 0.0, 6 / 3])[CLASSES]  # three classes occur
    torch.testing.assert_close(criterion(LOGITS, INPUTS, CLASSES), (each * nll).sum() / each.sum())
    for task in (smooth, weighted, balanced):
        assert task.sums(LOGITS, INPUTS, CLASSES) == plain.sums(LOGITS, INPUTS, CLASSES)
        task.check(TABLE)
    with pytest.raises(ConfigError, match="has 4 weights, but table has 7 classes"):
        weighted.check(replace(TABLE, num_classes=7))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("classification", {"label_smoothing": 1.0}, r"label_smoothing=1\.0 is not allowed"),
        ("classification", {"class_weights": "equal"}, "class_weights=equal must be null, balanced"),
        ("classification", {"class_weights": [-1.0]}, "must be null, balanced"),
        ("causal_lm", {"label_smoothing": -0.1}, "label_smoothing"),
        ("regression", {"huber": 0.0}, "huber"),
        ("multi_label", {"positive_weights": [0.0]}, "positive_weights"),
        ("clasification", {}, "did you mean classification"),
        ("collections:OrderedDict", {}, "must be a subclass of fedlp.tasks.Task"),
    ],
)
def test_what_a_task_does_not_allow_is_named(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_task(name, **options)


def test_causal_lm_counts_predicted_tokens() -> None:
    info = DataInfo("text", "causal_lm", (3,), 5, None, None)
    task, tokens = task_of(info), torch.tensor([[1, 2, 3, 4], [4, 0, IGNORE_INDEX, IGNORE_INDEX]])
    assert task.prepare(tokens, info, CPU).tolist() == [[1, 2, 3], [4, 0, 0]]
    logits = torch.from_numpy(RNG.standard_normal((2, 3, 5), dtype=np.float32))
    logs = logits.log_softmax(dim=-1)
    wanted = -(logs[0, 0, 2] + logs[0, 1, 3] + logs[0, 2, 4] + logs[1, 0, 0])
    targets = torch.tensor([0, 1])
    torch.testing.assert_close(task.loss(logits, tokens, targets), wanted / 4)
    metrics = task.summarize(task.sums(logits, tokens, targets))
    assert metrics["perplexity"] == pytest.approx(math.exp(float(wanted) / 4), rel=1e-6)
    whole = task.whole(Examples(tokens, targets, targets.numpy()))
    assert whole.inputs.tolist() == [[1, 2, 3, 4]]
    (batch,) = task.calibration_batches(whole, 8)
    assert task.labels(*batch).tolist() == [2, 3, 4]
    accurate = make_task("causal_lm", metrics=["accuracy", "perplexity"])
    assert accurate.sums(logits, tokens, targets)["accuracy.count"] == 4


def test_regression_takes_one_value_or_several() -> None:
    task = make_task("regression")
    outputs, targets = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([1.0, 1.0, 1.0])
    assert float(task.loss(outputs, outputs, targets)) == pytest.approx(17 / 3)
    metrics = task.summarize(task.sums(outputs, outputs, targets))
    assert metrics["rmse"] == pytest.approx(math.sqrt(17 / 3))
    assert metrics["mae"] == pytest.approx(5 / 3)
    assert metrics["loss"] == pytest.approx(17 / 3)
    pair = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    metrics = task.summarize(task.sums(pair, pair, torch.zeros(2, 2)))
    assert metrics["loss"] == pytest.approx(10 / 4)
    huber = make_task("regression", huber=1.0)
    assert float(huber.loss(outputs, outputs, targets)) == pytest.approx((0 + 0.5 + 3.5) / 3)


def test_multi_label_is_a_binary_question_for_each_label() -> None:
    task = make_task("multi_label")
    targets = torch.tensor([[1, 0, 0, 1]] * 6, dtype=torch.uint8)
    chances = LOGITS.sigmoid()
    expected = -torch.where(targets.bool(), chances, 1 - chances).log().mean()
    torch.testing.assert_close(task.loss(LOGITS, INPUTS, targets), expected)
    metrics = task.summarize(task.sums(LOGITS, INPUTS, targets))
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(float(((LOGITS > 0) == targets.bool()).double().mean()))
    assert set(metrics) == {"macro_f1", "accuracy", "loss"}


def test_sequence_classification_masks_padding_and_calibrates_without_it() -> None:
    info = DataInfo("text", "sequence_classification", (4,), 2, None, None, vocabulary=9)
    task = task_of(info)
    tokens = torch.tensor([[5, 6, -100, -100], [7, 8, 1, -100], [3, 4, -100, -100]])
    batch = task.prepare(tokens, info, CPU)
    assert not isinstance(batch, Tensor)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 1], [3, 4, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]
    found = list(task.calibration_batches(Examples(tokens, torch.tensor([0, 1, 1]), None), 2))
    assert [(x.tolist(), y.tolist()) for x, y in found] == [([[5, 6], [3, 4]], [0, 1]), ([[7, 8, 1]], [1])]
    assert task.prepare_whole(found[0][0], info, CPU).tolist() == [[5, 6], [3, 4]]


def test_float_inputs_are_normalised_only_where_there_is_a_mean() -> None:
    task, rows = task_of(TABLE), torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.equal(task.prepare(rows, TABLE, CPU), rows)
    scaled = replace(TABLE, mean=(1.0, 1.0, 1.0), std=(1.0, 2.0, 4.0))
    assert task.prepare(rows, scaled, CPU).tolist() == [[0.0, 0.5, 0.5]]
    assert rows.tolist() == [[1.0, 2.0, 3.0]]
    pixels = torch.full((1, 1, 2, 2), 51, dtype=torch.uint8)
    assert task.prepare(pixels, replace(TABLE, input_shape=(1, 2, 2)), CPU).flatten().tolist() == pytest.approx(
        [0.2] * 4
    )


@pytest.mark.parametrize(
    "name", ["classification", "causal_lm", "regression", "multi_label", "sequence_classification"]
)
def test_drawn_examples_fit_the_task(name: str) -> None:
    task = make_task(name)
    info = DataInfo("noise", task, (5,), 3, None, None, vocabulary=7)
    examples = task.draw_examples(info, 4, np.random.default_rng(0))
    assert len(examples) == 4
    batch = task.prepare(examples.inputs, info, CPU)
    first = batch if isinstance(batch, Tensor) else batch["input_ids"]
    assert first.shape == (4, 5)
    assert first.is_floating_point() != task.reads_tokens
    outputs = torch.zeros(4, 5, 3) if name == "causal_lm" else torch.zeros(4, 3)
    assert math.isfinite(float(task.loss(outputs, examples.inputs, examples.targets)))
    assert task.describe_inputs(info, "bytes")["name"] == ("input_ids" if task.reads_tokens else "inputs")


@dataclass(frozen=True)
class Margin(Task):
    """Multi-class hinge loss."""

    margin: float = 1.0
    metrics: tuple[str, ...] = ("accuracy", "top_k")

    def loss(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.multi_margin_loss(outputs, targets, margin=self.margin)

    def loss_sum(self, outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.multi_margin_loss(outputs, targets, margin=self.margin, reduction="sum")


def test_a_task_of_ones_own_gives_two_methods() -> None:
    task = Margin(margin=0.5)
    metrics = task.summarize(task.sums(LOGITS, INPUTS, CLASSES))
    assert list(metrics) == ["accuracy", "top_5", "loss"]
    assert metrics["top_5"] == 1.0
    assert metrics["loss"] == pytest.approx(float(task.loss(LOGITS, INPUTS, CLASSES)), rel=1e-6)
