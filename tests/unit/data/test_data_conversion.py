"""A user's data becomes examples: every form gives the same rows, and what does not fit is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fedlp.data.conversion import as_examples, describe_examples
from fedlp.data.examples import IGNORE_INDEX, Examples
from fedlp.errors import DataError

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((6, 3))
CLASSES = np.array([0, 2, 1, 0, 2, 1])
PIXELS = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


class Pairs(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(TABLE, CLASSES, strict=True)


FORMS = {
    "arrays": (TABLE, CLASSES),
    "lists": (TABLE.tolist(), CLASSES.tolist()),
    "tensors": (torch.from_numpy(TABLE), torch.from_numpy(CLASSES)),
    "mapping": {"x": TABLE, "y": CLASSES},
    "tensor data set": TensorDataset(torch.from_numpy(TABLE), torch.from_numpy(CLASSES)),
    "data set": Pairs(list(zip(TABLE, CLASSES, strict=True))),
    "data set of mappings": Pairs([{"inputs": x, "label": int(y)} for x, y in zip(TABLE, CLASSES, strict=True)]),
    "iterable": Stream(),
    "hugging face": datasets.Dataset.from_dict({"x": TABLE.tolist(), "label": CLASSES.tolist(), "note": ["a"] * 6}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_table_gives_the_same_examples(form: str) -> None:
    found = as_examples(FORMS[form])
    assert (found.inputs.dtype, found.targets.dtype) == (torch.float32, torch.int64)
    assert torch.equal(found.inputs, torch.from_numpy(TABLE).float())
    assert found.targets.tolist() == CLASSES.tolist()
    assert as_examples(found) is found


def test_images_of_any_kind_have_their_channels_first() -> None:
    first = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(pixels) for pixels in PIXELS]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    table = datasets.Dataset.from_dict({"image": pictures, "label": CLASSES}, features=features)
    forms: list[Any] = [(PIXELS, CLASSES), (first, CLASSES), Pairs(list(zip(pictures, CLASSES, strict=True))), table]
    for form in forms:
        found = as_examples(form)
        assert found.inputs.dtype == torch.uint8
        assert torch.equal(found.inputs, first)
    grey = as_examples(Pairs([(picture.convert("L"), 1) for picture in pictures]))
    assert grey.inputs.shape == (6, 1, 5, 4)
    assert as_examples((PIXELS[..., 0], CLASSES)).inputs.shape == (6, 1, 5, 4)


def test_token_ids_are_padded_and_without_labels_they_are_text() -> None:
    rows = {"input_ids": [[5, 6, 7], [8, 9]], "attention_mask": [[1, 1, 1], [1, 1]]}
    text = as_examples(datasets.Dataset.from_dict(rows))
    assert text.inputs.tolist() == [[5, 6, 7], [8, 9, IGNORE_INDEX]]
    assert text.groups is not None
    info = describe_examples("mine", text, None)
    assert (info.task, info.input_shape, info.num_classes) == ("causal_lm", (2,), 10)
    labelled = as_examples(datasets.Dataset.from_dict(rows | {"label": [1, 0]}))
    info = describe_examples("mine", labelled, None)
    assert (info.task, info.input_shape) == ("sequence_classification", (3,))
    assert (info.num_classes, info.vocabulary) == (2, 10)


def test_the_task_follows_from_the_targets_and_a_given_one_holds() -> None:
    labels = np.eye(3, dtype=np.int64)[CLASSES]
    for targets, task, outputs in (
        (CLASSES, "classification", 3),
        (TABLE[:, 0], "regression", 1),
        (TABLE[:, :1], "regression", 1),
        (TABLE[:, :2], "regression", 2),
        (labels, "multi_label", 3),
    ):
        train = as_examples((TABLE, targets))
        info = describe_examples("mine", train, train)
        assert (info.task, info.num_classes, info.input_shape) == (task, outputs, (3,))
        assert (info.num_train, info.num_test, info.mean) == (6, 6, ())
    tokens = as_examples((np.arange(12).reshape(6, 2), CLASSES))
    assert describe_examples("mine", tokens, None).task == "classification"
    assert describe_examples("mine", tokens, None, "sequence_classification").vocabulary == 12


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (object(), "train: a object cannot be read as examples; give arrays"),
        ((TABLE, CLASSES[:4]), "6 inputs but 4 targets"),
        ((TABLE, np.array(list("abcabc"))), "are no numbers"),
        ((np.full((2, 2), np.nan), [0, 1]), "NaN"),
        ((TABLE, np.full(6, np.inf)), "targets hold NaN or infinite"),
        ((TABLE[:0], CLASSES[:0]), "holds no examples"),
        ((TABLE[:, 0], CLASSES), "inputs have shape"),
        ((TABLE, np.full((6, 2), 3)), "indicators"),
        (Pairs([(TABLE[0], 1), (TABLE[0][:2], 1)]), r"train\[1\] has shape \(2,\), train\[0\] \(3,\); resize"),
        (Pairs([(TABLE[0], 1), 5]), r"train\[1\] is a int, not a pair"),
        (Pairs([("text", 1)]), r"train\[0\]: a str is no number, array or image"),
        (Pairs([{"text": "a", "label": 1}]), r"train\[0\] has the keys text, label; give an input"),
        (Pairs([]), "holds no examples"),
        (datasets.Dataset.from_dict({"text": ["a"], "label": [1]}), "among the columns text, label; rename"),
    ],
)
def test_what_cannot_be_read_is_named(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        as_examples(data)


def test_unequal_shapes_and_negative_classes_are_refused() -> None:
    train = as_examples((TABLE, CLASSES))
    with pytest.raises(DataError, match="test example"):
        describe_examples("mine", train, as_examples((TABLE[:, :2], CLASSES)))
    with pytest.raises(DataError, match="negative"):
        describe_examples("mine", Examples(train.inputs, train.targets - 1, None), None)
