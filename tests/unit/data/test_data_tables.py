"""Tables and arrays: every kind of column becomes numbers, targets become classes, values or labels."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from fedlp.config import DatasetConfig
from fedlp.config.parts import read_part
from fedlp.data.datasets import describe_dataset, load_dataset
from fedlp.data.examples import FederatedData
from fedlp.errors import ConfigError, DataError

TABLE = pandas.DataFrame(
    {
        "age": [20.0, 30.0, None, 50.0, 60.0, 70.0, 20.0, 40.0],
        "rooms": [1, 2, 3, 4, 1, 2, 3, 4],
        "town": ["x", "y", "x", None, "z", "y", "x", "x"],
        "owner": [True, False, True, True, False, False, True, False],
        "bank": ["b2", "b1", "b2", "b1", "b2", "b1", "b10", "b10"],
        "price": [1.5, 2.25, 3.0, 4.75, 1.0, 2.0, 3.5, 4.0],
        "risk": ["low", "high", "low", "high", "low", "low", "high", "low"],
    }
)


def dataset(path: Path, name: str = "csv", **options: object) -> DatasetConfig:
    return read_part(DatasetConfig, "dataset", {"name": name, "path": str(path), **options})


@pytest.fixture(params=["csv", "parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / f"table.{request.param}"
    TABLE.to_csv(path, index=False) if request.param == "csv" else TABLE.to_parquet(path)
    return path, request.param


def rows(data: FederatedData) -> torch.Tensor:
    """Return all inputs, in the order of the file, standardised as a task does."""
    inputs = torch.cat([data.train.inputs, data.test.inputs])
    return (inputs - torch.tensor(data.info.mean)) / torch.tensor(data.info.std)


def test_numeric_and_categorical_columns(table: tuple[Path, str]) -> None:
    path, name = table
    config = dataset(path, name, target="risk", client="bank", exclude=["price"], test_fraction=0.25)
    info = describe_dataset(config)
    assert (info.task, info.num_classes, info.labels) == ("classification", 2, ("high", "low"))
    assert info.input_shape == (6,)  # age, rooms, owner; town is x, y, z
    data = load_dataset(config, 0)
    assert (len(data.train), len(data.test)) == (6, 2)
    assert sorted(data.test.targets.tolist()) == [0, 1]
    found = rows(data)
    numbers = found[:, :3]
    assert numbers.mean(dim=0).abs().max() < 1e-6
    assert torch.equal(
        torch.cat([data.train.inputs, data.test.inputs])[:, 3:].sum(dim=1).sort().values[:1], torch.zeros(1)
    )
    assert data.train.groups is not None
    assert set(data.train.groups.tolist()) <= {0, 1, 2}
    ages = torch.cat([data.train.inputs, data.test.inputs])[:, 0]
    assert sorted(ages.tolist())[4] == pytest.approx(np.nanmean(TABLE["age"]))  # a missing age is the mean


def test_targets_become_what_they_look_like(table: tuple[Path, str]) -> None:
    path, name = table
    price = load_dataset(dataset(path, name, target="price", exclude=["bank"]), 0)
    assert price.info.task == "regression"
    assert price.train.targets.dtype == torch.float32
    assert price.info.num_classes == 1
    pair = load_dataset(dataset(path, name, target=["price", "age"]), 0)
    assert (pair.info.task, pair.info.num_classes) == ("regression", 2)
    assert len(pair.train) + len(pair.test) == 7  # one age is missing
    rooms = describe_dataset(dataset(path, name, target="rooms"))
    assert (rooms.task, rooms.labels) == ("classification", ("1", "2", "3", "4"))
    assert describe_dataset(dataset(path, name, target="rooms", task="regression")).task == "regression"
    flags = load_dataset(dataset(path, name, target=["owner"], task="multi_label"), 0)
    assert flags.train.targets.dtype == torch.uint8
    assert flags.info.labels == ("owner",)
    numeric = load_dataset(dataset(path, name, target="risk", columns=["rooms"], standardize=False), 0)
    assert numeric.info.mean == ()
    assert set(numeric.train.inputs.flatten().tolist()) <= {1.0, 2.0, 3.0, 4.0}


def test_labels_categories_and_normalisation_of_the_config_hold(table: tuple[Path, str]) -> None:
    path, name = table
    options = {"target": "risk", "columns": ["rooms", "town"], "categories": {"town": ["z", "x"]}}
    known = {"labels": ["none", "low", "high"], "mean": [1.0, 0.0, 0.0], "std": [2.0, 1.0, 1.0]}
    data = load_dataset(dataset(path, name, **options, **known), 0)
    assert data.info.labels == ("none", "low", "high")
    assert data.info.num_classes == 3
    assert (data.info.mean, data.info.std) == ((1.0, 0.0, 0.0), (2.0, 1.0, 1.0))
    assert set(torch.cat([data.train.targets, data.test.targets]).tolist()) == {1, 2}
    town = torch.cat([data.train.inputs, data.test.inputs])[:, 1:]
    assert town.sum(dim=0).tolist() == [1.0, 4.0]  # y is not known, as one is missing
    with pytest.raises(DataError, match="3 rows have an unknown label, the first is 'high'; the labels are low"):
        load_dataset(dataset(path, name, target="risk", labels=["low"]), 0)


def test_a_test_file_and_folders_of_files(tmp_path: Path) -> None:
    for number in range(2):
        TABLE.to_csv(tmp_path / f"part{number}.csv", index=False)
    (tmp_path / "test").mkdir()
    TABLE.head(3).to_csv(tmp_path / "test/rest.csv", index=False)
    data = load_dataset(dataset(tmp_path, test_path=str(tmp_path / "test"), target="risk", exclude=["bank"]), 0)
    assert (len(data.train), len(data.test)) == (16, 3)


def test_rows_without_a_target_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TABLE.to_csv(tmp_path / "a.csv", index=False)
    with caplog.at_level(logging.WARNING, logger="fedlp"):
        load_dataset(dataset(tmp_path / "a.csv", target="age", exclude=["bank"]), 0)
    assert "1 rows without a target are left out" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs dataset.path=FILE and dataset.target=COLUMN"),
        ({"target": "cost"}, "has no column 'cost'; it has age, rooms, town"),
        ({"target": "risk", "client": "branch"}, "has no column 'branch'"),
        ({"target": "risk", "columns": ["age", "agee"]}, "has no column 'agee'"),
        ({"target": "town", "task": "regression"}, "target town holds no numbers"),
        ({"target": ["risk", "town"], "task": "classification"}, "names several columns"),
        ({"target": ["price", "rooms"], "task": "multi_label"}, "hold 0 and 1 alone"),
        ({"target": "risk", "client": "town"}, "1 rows have no client in column town"),
        ({"target": "risk", "categorical": []}, "column town holds no numbers"),
        ({"target": "risk", "columns": ["risk"]}, "has no columns but the target"),
        ({"target": "risk", "mean": [0.0], "std": [1.0]}, "have 1 and 1 numbers, but there are"),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, object], words: str, tmp_path: Path) -> None:
    TABLE.to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises((DataError, ConfigError), match=words) as error:
        load_dataset(dataset(tmp_path / "a.csv", **options), 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "ranking"}, "one of auto, classification"),
        ({"mean": [1.0]}, "given together"),
        ({"mean": [1.0], "std": [0.0]}, "above 0"),
        ({"test_fraction": 0.0}, "test_fraction"),
        ({"max_train_examples": 0}, "max_train_examples"),
        ({"tokenizer": "x"}, "no option dataset.tokenizer with dataset=csv"),
    ],
)
def test_values_out_of_range(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataset(Path("x"), target="y", **options)


def test_unusable_files(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no parquet")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.csv").write_text("")
    dates = pandas.DataFrame({"d": pandas.date_range("2020", periods=3), "y": [0, 1, 0]})
    dates.to_parquet(tmp_path / "d.parquet")
    many = pandas.DataFrame({"id": [f"n{i}" for i in range(2000)], "y": [0, 1] * 1000})
    many.to_parquet(tmp_path / "e.parquet")
    infinite = pandas.DataFrame({"x": [1.0, np.inf, 2.0], "y": [0, 1, 0]})
    infinite.to_parquet(tmp_path / "f.parquet")
    for file, name, words in (
        ("a.parquet", "parquet", "cannot be read as parquet"),
        ("b.csv", "csv", "cannot be read as csv"),
        ("c.csv", "csv", "cannot be read as csv"),
        ("none.csv", "csv", "no file .*none.csv"),
        ("d.parquet", "parquet", "column d holds dates"),
        ("e.parquet", "parquet", "column id has 2,000 categories"),
        ("f.parquet", "parquet", "holds infinite values"),
    ):
        with pytest.raises(DataError, match=words) as error:
            load_dataset(dataset(tmp_path / file, name, target="y"), 0)
        assert "\n" not in str(error.value)


# ---- arrays
X, Y = np.random.default_rng(0).random((10, 4)), np.arange(10) % 2


def test_arrays_with_and_without_a_test_part(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=Y, client=list("aabbccddee"))
    data = load_dataset(dataset(tmp_path / "a.npz", "arrays", test_fraction=0.2), 0)
    assert (len(data.train), len(data.test)) == (8, 2)
    assert sorted(data.test.targets.tolist()) == [0, 1]
    assert (data.info.task, data.info.input_shape, data.info.num_classes) == ("classification", (4,), 2)
    assert data.train.groups is not None
    assert set(data.train.groups.tolist()) <= set(range(5))
    folder = tmp_path / "folder"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), dtype=np.uint8)
    for name, array in {"x_train": pixels, "y_train": Y[:6], "x_test": pixels[:2], "y_test": Y[:2]}.items():
        np.save(folder / f"{name}.npy", array)
    images = load_dataset(dataset(folder, "arrays", mean=[0.5] * 3, std=[0.25] * 3, augment=True), 0)
    assert images.info.input_shape == (3, 8, 8)
    assert (images.info.num_train, images.info.num_test, images.info.augment) == (6, 2, True)
    assert torch.equal(images.train.inputs[:1], torch.from_numpy(pixels[:1].transpose(0, 3, 1, 2).copy()))
    values = load_dataset(dataset(tmp_path / "a.npz", "arrays", task="sequence_classification"), 0)
    assert values.info.task == "sequence_classification"


def test_unusable_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "no_y.npz", x=X)
    np.savez(tmp_path / "others.npz", a=X)
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object), y=[1])
    (tmp_path / "text.npz").write_text("no archive")
    for name, words in (
        ("no_y", "has inputs but no y; it has x"),
        ("others", "has no x and y, nor x_train and y_train; it has a"),
        ("objects", "cannot be read as arrays of numbers"),
        ("text", "cannot be read as arrays of numbers"),
        ("none", "there is no .*none.npz"),
    ):
        with pytest.raises(DataError, match=words) as error:
            load_dataset(dataset(tmp_path / f"{name}.npz", "arrays"), 0)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_million_rows_are_read_in_seconds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {f"x{i}": rng.standard_normal(1_000_000) for i in range(10)}
    big = pandas.DataFrame({**columns, "kind": rng.choice(list("abc"), 1_000_000), "y": rng.integers(0, 3, 1_000_000)})
    big.to_parquet(tmp_path / "big.parquet")
    data = load_dataset(dataset(tmp_path / "big.parquet", "parquet", target="y"), 0)
    assert len(data.train) + len(data.test) == 1_000_000
    assert data.info.input_shape == (13,)
