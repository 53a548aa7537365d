"""Image classification: scikit-learn's embedded digits, and torchvision's CIFAR and MNIST families."""

from __future__ import annotations

import gzip
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import DataInfo, Examples, FederatedData, subset
from fedlp.errors import ConfigError, DataError
from fedlp.rng import Stream, generator

if TYPE_CHECKING:
    from torch import Tensor

    from fedlp.config import DatasetConfig


@dataclass(frozen=True, slots=True)
class VisionSet:
    """Facts of one published set; means and deviations are those of its training images on a [0, 1] scale."""

    input_shape: tuple[int, int, int]
    num_train: int
    num_test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int = 10
    padding: int = 4
    flip: bool = False
    torchvision_class: str = ""
    source: str = ""


_MNIST_FILES: Final = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
_DIGITS = VisionSet((1, 8, 8), 1797, 0, mean=(0.3053,), std=(0.3759,), padding=1)  # no test split of its own
SETS: Final = {
    "digits": _DIGITS,
    "cifar10": VisionSet(
        (3, 32, 32),
        num_train=50_000,
        num_test=10_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        flip=True,
        torchvision_class="CIFAR10",
        source="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    "cifar100": VisionSet(
        (3, 32, 32),
        num_train=50_000,
        num_test=10_000,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        num_classes=100,
        flip=True,
        torchvision_class="CIFAR100",
        source="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
    "mnist": VisionSet(
        (1, 28, 28),
        num_train=60_000,
        num_test=10_000,
        mean=(0.1307,),
        std=(0.3081,),
        torchvision_class="MNIST",
        source="https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "fashion_mnist": VisionSet(
        (1, 28, 28),
        num_train=60_000,
        num_test=10_000,
        mean=(0.2860,),
        std=(0.3530,),
        flip=True,
        torchvision_class="FashionMNIST",
        source="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
}


def describe_vision(config: DatasetConfig) -> DataInfo:
    """Return the facts of a named set, after truncation; touches no file."""
    known = SETS[config.name]
    num_train, num_test = known.num_train, known.num_test
    if known is _DIGITS:
        num_test = _digits_test_size(config.test_fraction)
        num_train -= num_test
    return DataInfo(
        name=config.name,
        task="classification",
        input_shape=known.input_shape,
        num_classes=known.num_classes,
        num_train=min(num_train, config.max_train_examples or num_train),
        num_test=min(num_test, config.max_test_examples or num_test),
        mean=_channel_values("mean", config.mean, known.mean),
        std=_channel_values("std", config.std, known.std),
        augment=config.augment,
        padding=known.padding,
        flip=known.flip,
    )


def _channel_values(name: str, given: list[float] | None, own: tuple[float, ...]) -> tuple[float, ...]:
    """Return the configured normalisation, or the data set's own."""
    if given is None:
        return own
    if (
        len(given) != len(own)
        or not all(math.isfinite(value) for value in given)
        or (name == "std" and min(given) <= 0)
    ):
        raise ConfigError(
            f"dataset.{name}={given} is not allowed: it must be {len(own)} finite numbers"
            + (" above 0" if name == "std" else "")
        )
    return tuple(given)


def load_vision(config: DatasetConfig, seed: int) -> FederatedData:
    """Return a named set; digits is split by ``seed``, the others have a test split of their own.

    Raises
    ------
    DataError
        If files are absent and may not or cannot be downloaded, or are not what their name says.
    """
    if config.name == "digits":
        train, test = _load_digits(config.test_fraction, generator(seed, Stream.DATA, 0))
    else:
        train, test = _load_torchvision(SETS[config.name], config)
    return FederatedData(
        describe_vision(config),
        subset(train, config.max_train_examples, generator(seed, Stream.DATA, 1)),
        subset(test, config.max_test_examples, generator(seed, Stream.DATA, 2)),
    )


def _digits_test_size(fraction: float) -> int:
    return min(max(round(fraction * _DIGITS.num_train), 1), _DIGITS.num_train - 1)


def _load_digits(test_fraction: float, rng: np.random.Generator) -> tuple[Examples, Examples]:
    """Return the training and the test part; every class is held out in proportion, within one example."""
    import torch
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)  # 0 to 16, float64
    pixels = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, *_DIGITS.input_shape)
    whole = Examples(torch.from_numpy(pixels), torch.from_numpy(targets.astype(np.int64)), None)
    order = rng.permutation(len(whole))
    order = order[np.argsort(targets[order], kind="stable")]
    size = _digits_test_size(test_fraction)
    held_out: NDArray[np.bool_] = np.zeros(len(whole), dtype=np.bool_)
    held_out[order[np.arange(size) * len(whole) // size]] = True
    return whole.select(np.flatnonzero(~held_out)), whole.select(np.flatnonzero(held_out))


def _load_torchvision(known: VisionSet, config: DatasetConfig) -> tuple[Examples, Examples]:
    from fedlp.models.torchvision_compat import import_torchvision

    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fedlp" / config.name
    root = Path(config.root or cache).expanduser()
    remedy = (
        f"set dataset.root=PATH to a folder that torchvision.datasets.{known.torchvision_class} reads, "
        f"or allow dataset.download=true, which fetches {known.source}"
    )
    if not config.download and not root.is_dir():
        raise DataError(f"{config.name}: no folder {root}; {remedy}")
    loader = getattr(import_torchvision().datasets, known.torchvision_class)
    try:
        with _unpacked(root, known.torchvision_class) as folder:
            train = _as_examples(loader(folder, train=True, download=config.download), known, known.num_train)
            test = _as_examples(loader(folder, train=False), known, known.num_test)
    except Exception as error:  # torchvision lets anything through, from AssertionError to TarError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{config.name}: cannot read {root} ({reason}); {remedy}") from error
    return train, test


@contextmanager
def _unpacked(root: Path, name: str) -> Iterator[Path]:
    """Yield a root whose MNIST files are unpacked: ``root``, or a passing copy if all lie there but some only gzipped.

    torchvision unpacks only what was packed by the gzip it knows, next to it; ``root`` may be read-only.
    """
    plain = [root / name / "raw" / file for file in _MNIST_FILES]
    packed = [path.with_name(f"{path.name}.gz") for path in plain]
    present = [path.is_file() for path in plain]
    if all(present) or not all(here or path.is_file() for here, path in zip(present, packed, strict=True)):
        yield root
        return
    with TemporaryDirectory(prefix="fedlp-") as scratch:
        folder = Path(scratch, name, "raw")
        folder.mkdir(parents=True)
        for here, path, archive in zip(present, plain, packed, strict=True):
            with path.open("rb") if here else gzip.open(archive) as source, (folder / path.name).open("wb") as sink:
                shutil.copyfileobj(source, sink)
        yield Path(scratch)


def _as_examples(dataset: Any, known: VisionSet, count: int) -> Examples:
    """Return the arrays behind a torchvision data set, channels first and without a copy."""
    import torch

    pixels: Tensor = torch.as_tensor(dataset.data)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    targets: Tensor = torch.as_tensor(dataset.targets, dtype=torch.int64)
    if tuple(pixels.shape) != (count, *known.input_shape) or tuple(targets.shape) != (count,):
        raise DataError(f"found {tuple(pixels.shape)} images and {len(targets)} labels where {count} were expected")
    if int(targets.min()) < 0 or int(targets.max()) >= known.num_classes:
        raise DataError(f"found labels outside 0 to {known.num_classes - 1}")
    return Examples(pixels, targets, None)
