"""Data of one's own by module:object, and labelled text of Hugging Face."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from fedlp.config import DatasetConfig
from fedlp.config.parts import read_part
from fedlp.data.conversion import as_examples, describe_examples
from fedlp.data.datasets import describe_dataset, load_dataset
from fedlp.data.examples import IGNORE_INDEX, DataInfo, FederatedData
from fedlp.errors import ConfigError, DataError
from fedlp.models.transformers_loading import import_transformers
from fedlp.tasks import task_of

X, Y = np.random.default_rng(0).random((10, 4)), np.arange(10) % 2


def dataset(name: str, **options: object) -> DatasetConfig:
    return read_part(DatasetConfig, "dataset", {"name": name, **options})


def pair() -> Any:
    return (X, Y), (X[:3], Y[:3])


def train_only(scale: float = 1.0) -> Any:
    return X * scale, Y


def mapping() -> Any:
    table = datasets.Dataset.from_dict({"x": X.tolist(), "y": Y.tolist()})
    return datasets.DatasetDict({"train": table, "validation": table.select(range(4))})


def whole() -> FederatedData:
    train = as_examples((X, Y))
    return FederatedData(describe_examples("mine", train, train), train, train)


def broken() -> Any:
    raise OSError("no such disk\nanywhere")


def nothing() -> Any:
    return None


class Own:
    """A reader without a base class."""

    def __init__(self, count: int = 4) -> None:
        self.count = count

    def describe(self) -> DataInfo:
        return describe_examples("own", as_examples((X[: self.count], Y[: self.count])), None)

    def load(self, seed: int) -> FederatedData:
        train = as_examples((X[: self.count], Y[: self.count]))
        return FederatedData(self.describe(), train, train)


class NoReader:
    """A class that reads nothing."""


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "theirs", sys.modules[__name__])


@pytest.mark.parametrize(
    ("name", "num_train", "num_test"),
    [("pair", 10, 3), ("train_only", 9, 1), ("mapping", 10, 4), ("whole", 10, 10), ("Own", 4, 4)],
)
def test_a_function_or_class_of_ones_own_is_a_data_set(name: str, num_train: int, num_test: int) -> None:
    config = dataset(f"theirs:{name}")
    data = load_dataset(config, 0)
    assert (len(data.train), len(data.test)) == (num_train, num_test)
    assert describe_dataset(config).input_shape == data.info.input_shape == (4,)
    assert data.info.num_classes == 2


def test_its_parameters_are_options_and_its_examples_are_limited() -> None:
    data = load_dataset(dataset("theirs:train_only", scale=0.0, max_train_examples=5), 0)
    assert len(data.train) == 5
    assert data.train.inputs.abs().max() == 0
    assert len(load_dataset(dataset("theirs:Own", count=2), 0).train) == 2
    with pytest.raises(ConfigError, match=r"no option dataset\.scal"):
        dataset("theirs:train_only", scal=1.0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", "dataset=broken failed: OSError: no such disk"),
        ("nothing", r"nothing \(train\): a NoneType cannot be read as examples"),
        ("NoReader", "is a class without describe"),
        ("absent", "theirs has no absent"),
    ],
)
def test_what_it_does_wrong_is_one_line(name: str, words: str) -> None:
    with pytest.raises((ConfigError, DataError), match=words) as error:
        load_dataset(dataset(f"theirs:{name}"), 0)
    assert "\n" not in str(error.value)


def test_objects_of_a_script_cannot_be_read_again() -> None:
    with pytest.raises(ConfigError, match="were objects of a script"):
        load_dataset(dataset("object"), 0)


# ---- labelled text
TEXTS = [
    f"the {word} day was {'good' if label else 'bad'}" for word in ("first", "next", "last") for label in (0, 1)
] * 4


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "day", "was", "good", "bad"]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "first", "next", "last"]))
    import_transformers().BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    labels = ["good" in text for text in TEXTS]
    columns = {
        "sentence": TEXTS,
        "label": [["neg", "pos"][x] for x in labels],
        "writer": [f"w{i % 3}" for i in range(24)],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "reviews")
    return tmp_path / "reviews"


def test_text_with_a_label_is_classified(reviews: Path, tokenizer: str) -> None:
    options = {"path": str(reviews), "tokenizer": tokenizer, "sequence_length": 10, "test_fraction": 0.25}
    data = load_dataset(dataset("hf", **options, client_column="writer"), 0)
    info = data.info
    assert (info.task, info.num_classes, info.vocabulary, info.labels) == (
        "sequence_classification",
        2,
        13,
        ("neg", "pos"),
    )
    assert (len(data.train), len(data.test)) == (18, 6)
    row = data.train.inputs[0].tolist()
    assert row[0] == 2  # [CLS]
    assert row[7:] == [IGNORE_INDEX] * 3
    assert (row[5] == 8) == bool(data.train.targets[0])
    assert data.train.groups is not None
    assert set(data.train.groups.tolist()) == {0, 1, 2}
    batch = task_of(info).prepare(data.train.inputs[:2], info, torch.device("cpu"))
    assert not isinstance(batch, torch.Tensor)
    assert batch["input_ids"].shape == (2, 7)
    short = load_dataset(dataset("hf", **options | {"sequence_length": 4}), 0).train.inputs
    assert short.shape[1] == 4
    assert set(short[:, 3].tolist()) == {3}  # [SEP] is kept


def test_without_its_label_the_text_is_a_language_models(reviews: Path) -> None:
    data = load_dataset(dataset("hf", path=str(reviews), label_column=None, sequence_length=8), 0)
    assert (data.info.task, data.info.num_classes) == ("causal_lm", 256)
    assert data.train.inputs.shape[1] == 9


def test_columns_asked_for_by_name(reviews: Path, tokenizer: str) -> None:
    config = dataset("hf", path=str(reviews), text_column="writer", label_column="label", tokenizer=tokenizer)
    assert describe_dataset(config).task == "sequence_classification"
    for options, words in (
        (
            {"text_column": "review"},
            r"\(split train\) has no column 'review'; set dataset.text_column to one of sentence, label, writer",
        ),
        ({"label_column": "stars"}, "has no column 'stars'; set dataset.label_column"),
        ({"client_column": "place"}, "has no column 'place'; set dataset.client_column"),
        ({"test_split": "dev"}, "has no split dev; check dataset.test_split"),
        ({"labels": ["pos"]}, "has the unknown label neg; the labels are pos"),
    ):
        with pytest.raises(DataError, match=words) as error:
            load_dataset(dataset("hf", path=str(reviews), tokenizer=tokenizer, **options), 0)
        assert "\n" not in str(error.value)
