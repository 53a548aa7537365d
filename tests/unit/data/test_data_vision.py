from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlp.config import DatasetConfig
from fedlp.config.parts import read_part
from fedlp.data import digits
from fedlp.data.datasets import describe_dataset, load_dataset
from fedlp.errors import ConfigError, DataError
from fedlp.registry import lookup

SETS = ("digits", "cifar10", "cifar100", "mnist", "fashion_mnist")


def dataset(**options: object) -> DatasetConfig:
    return read_part(DatasetConfig, "dataset", options)


def write_idx(path: Path, values: np.ndarray, packed: bool = False) -> None:
    """Write an array in MNIST's file format."""
    header = struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data, 1) if packed else data)


def write_mnist(root: Path, packed: bool = False) -> None:
    """Write files as large as MNIST's; image ``i`` is filled with ``i % 251`` and is of class ``i % 10``."""
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        suffix = ".gz" if packed else ""
        values = np.arange(count)
        images = np.broadcast_to((values % 251)[:, None, None], (count, 28, 28))
        write_idx(root / "MNIST/raw" / f"{part}-images-idx3-ubyte{suffix}", images, packed)
        write_idx(root / "MNIST/raw" / f"{part}-labels-idx1-ubyte{suffix}", values % 10, packed)


@pytest.mark.parametrize("name", SETS)
def test_named_sets_are_described_without_data(name: str, tmp_path: Path) -> None:
    absent = {} if name == "digits" else {"root": str(tmp_path / "absent"), "download": False}
    info = describe_dataset(dataset(name=name, augment=True, **absent))
    assert info.name == name
    assert info.task == "classification"
    assert len(info.mean) == len(info.std) == info.input_shape[0]
    assert info.num_classes == (100 if name == "cifar100" else 10)
    assert info.augment
    assert info.num_train is not None
    assert info.num_train > 1000
    assert list(tmp_path.iterdir()) == []


def test_truncation_is_described() -> None:
    info = describe_dataset(dataset(name="mnist", max_train_examples=100, max_test_examples=10**9))
    assert (info.num_train, info.num_test) == (100, 10_000)


def test_describing_imports_no_large_library() -> None:
    code = (
        "import sys; from fedlp.config import DatasetConfig; from fedlp.data.datasets import describe_dataset\n"
        "from fedlp.config.parts import read_part\n"
        "describe_dataset(read_part(DatasetConfig, 'dataset', {'name': 'cifar10'}))\n"
        "assert not {'torch', 'torchvision', 'sklearn', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_one_line() -> None:
    with pytest.raises(ConfigError, match="there is no dataset mnits; did you mean mnist"):
        dataset(name="mnits")


def test_digits() -> None:
    config = dataset(name="digits", test_fraction=0.2)
    data = load_dataset(config, 0)
    assert (len(data.train), len(data.test)) == (data.info.num_train, data.info.num_test) == (1438, 359)
    assert data.train.inputs.shape == (1438, 1, 8, 8)
    assert data.train.inputs.dtype == torch.uint8
    assert data.train.targets.dtype == torch.int64
    assert int(data.train.inputs.max()) == 255
    assert data.train.groups is None
    everything = torch.cat([data.train.inputs, data.test.inputs]).double() / 255
    assert float(everything.mean()) == pytest.approx(data.info.mean[0], abs=5e-5)
    assert float(everything.std(correction=0)) == pytest.approx(data.info.std[0], abs=5e-5)
    counts = torch.bincount(data.train.targets) * 0.25 - torch.bincount(data.test.targets)
    assert counts.abs().max() <= 2  # every class is held out in proportion


def test_digits_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    own, theirs = digits.read_digits(), load_digits(return_X_y=True)
    monkeypatch.setattr(digits, "find_spec", lambda name: None)  # no such file, as in another version
    for found in (own, digits.read_digits()):
        assert all(np.array_equal(one, other) for one, other in zip(found, theirs, strict=True))


def test_digits_split_follows_the_seed_alone() -> None:
    config = dataset(name="digits", test_fraction=0.3, max_train_examples=200, max_test_examples=50)
    first, again, other = (load_dataset(config, seed) for seed in (4, 4, 5))
    assert (len(first.train), len(first.test)) == (200, 50)
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert torch.equal(first.test.targets, again.test.targets)
    assert not torch.equal(first.train.inputs, other.train.inputs)


def test_select() -> None:
    data = load_dataset(dataset(name="digits"), 0)
    chosen = data.train.select(np.array([5, 2]))
    assert len(chosen) == 2
    assert torch.equal(chosen.inputs[0], data.train.inputs[5])
    assert chosen.targets.tolist() == data.train.targets[[5, 2]].tolist()


def check_failure(config: DatasetConfig, *words: str) -> None:
    with pytest.raises(DataError) as error:
        load_dataset(config, 0)
    message = str(error.value)
    assert "\n" not in message
    for word in (
        config.name,
        "dataset.root=PATH",
        "dataset.download=true",
        lookup("dataset", config.name).source,
        *words,
    ):
        assert word in message


@pytest.mark.parametrize("name", [name for name in SETS if name != "digits"])
def test_absent_files_are_one_line(name: str, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    check_failure(dataset(name=name, root=str(absent), download=False), f"no folder {absent}")
    check_failure(dataset(name=name, root=str(tmp_path), download=False), f"cannot read {tmp_path}")
    assert not absent.exists()


@pytest.mark.parametrize("name", ["cifar100", "fashion_mnist"])
def test_no_network_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    check_failure(dataset(name=name, root=str(tmp_path)), "no route to host")


def test_default_root_is_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    check_failure(dataset(name="cifar10", download=False), str(tmp_path / "xdg" / "fedlp" / "cifar10"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    check_failure(dataset(name="cifar10", download=False), str(tmp_path / ".cache" / "fedlp" / "cifar10"))


def test_mnist_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = load_dataset(dataset(name="mnist", root=str(tmp_path), download=False, max_test_examples=7), 0)
    assert data.train.inputs.shape == (60_000, 1, 28, 28)
    assert data.train.inputs.dtype == torch.uint8
    assert data.train.inputs[777].unique().tolist() == [777 % 251]
    assert data.train.targets[777] == 7
    assert len(data.test) == data.info.num_test == 7


def test_packed_mnist_files_are_read_and_left_alone(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=True)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz").unlink()
    check_failure(dataset(name="mnist", root=str(tmp_path), download=False))
    write_idx(tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte", np.arange(10_000) % 10)
    before = sorted(tmp_path.rglob("*"))
    data = load_dataset(dataset(name="mnist", root=str(tmp_path), download=False), 0)
    assert data.train.inputs[777].unique().tolist() == [777 % 251]
    assert data.test.targets[:3].tolist() == [0, 1, 2]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", ["short", "empty", "labels", "count", "packed"])
def test_damaged_mnist_files_are_one_line(damage: str, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    images, labels = (tmp_path / "MNIST/raw" / f"train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    word = ""
    if damage == "short":
        os.truncate(images, 1000)
    elif damage == "empty":
        os.truncate(images, 0)
    elif damage == "labels":
        write_idx(labels, np.full(60_000, 10))
        word = "labels outside 0 to 9"
    elif damage == "count":
        write_idx(labels, np.zeros(59_999))
        word = "59999 labels where 60000"
    else:
        images.rename(images.with_name(images.name + ".gz"))
        word = "gzip"
    check_failure(dataset(name="mnist", root=str(tmp_path)), str(tmp_path), word)


def test_foreign_cifar_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch broken'\ntR.")
    check_failure(dataset(name="cifar10", root=str(tmp_path), download=False), "corrupted")


@pytest.mark.shared
def test_real_mnist(shared: Path) -> None:
    data = load_dataset(dataset(name="mnist", root=str(shared / "mnist"), download=False), 0)
    pixels = data.train.inputs.numpy() / 255
    assert pixels.mean() == pytest.approx(data.info.mean[0], abs=5e-5)
    assert pixels.std() == pytest.approx(data.info.std[0], abs=5e-5)
    assert data.train.targets[:5].tolist() == [5, 0, 4, 1, 9]
    assert len(data.test) == 10_000


@pytest.mark.slow
@pytest.mark.shared
def test_real_cifar10(shared: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, shared / "cifar10/restore.py", tmp_path], check=True, capture_output=True)
    from fedlp.models.torchvision_compat import import_torchvision

    import_torchvision()
    data = load_dataset(dataset(name="cifar10", root=str(tmp_path), download=False), 0)  # torchvision checks MD5
    assert data.train.inputs.shape == (50_000, 3, 32, 32)
    assert data.test.inputs.shape == (10_000, 3, 32, 32)
    assert data.train.inputs.is_contiguous()
    assert torch.bincount(data.train.targets).tolist() == [5000] * 10
    pixels = data.train.inputs.numpy()
    assert pixels.mean(axis=(0, 2, 3)) / 255 == pytest.approx(data.info.mean, abs=5e-5)
    assert pixels.std(axis=(0, 2, 3)) / 255 == pytest.approx(data.info.std, abs=1e-4)
