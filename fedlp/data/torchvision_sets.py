"""torchvision's CIFAR and MNIST families."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Final

from fedlp.data.examples import DataInfo, Examples, FederatedData
from fedlp.data.reader import Limited, channel_values
from fedlp.errors import DataError
from fedlp.registry import register

if TYPE_CHECKING:
    from torch import Tensor

_MNIST_FILES: Final = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


@dataclass(frozen=True, kw_only=True)
class TorchvisionSet(Limited):
    """A published set of images, read by torchvision.

    Attributes
    ----------
    root : str or None
        Folder that torchvision reads or downloads to; ``~/.cache/fedlp/NAME`` if None.
    download : bool
        Whether files that are absent may be fetched.
    augment : bool
        Whether training images are cropped at random after padding by four pixels, and mirrored where that keeps the
        class.
    mean, std : list of float or None
        Normalisation by channel on a [0, 1] scale; that of the set's training images if None.
    """

    root: str | None = None
    download: bool = True
    augment: bool = False
    mean: list[float] | None = None
    std: list[float] | None = None

    name: ClassVar[str]
    torchvision_class: ClassVar[str]
    source: ClassVar[str]
    input_shape: ClassVar[tuple[int, int, int]]
    num_train: ClassVar[int]
    num_test: ClassVar[int]
    own_mean: ClassVar[tuple[float, ...]]
    own_std: ClassVar[tuple[float, ...]]
    num_classes: ClassVar[int] = 10
    flip: ClassVar[bool] = False

    def describe(self) -> DataInfo:
        """Return the facts, after truncation; touches no file."""
        return DataInfo(
            name=self.name,
            task="classification",
            input_shape=self.input_shape,
            num_classes=self.num_classes,
            num_train=min(self.num_train, self.max_train_examples or self.num_train),
            num_test=min(self.num_test, self.max_test_examples or self.num_test),
            mean=channel_values("mean", self.mean, self.own_mean),
            std=channel_values("std", self.std, self.own_std),
            augment=self.augment,
            padding=4,
            flip=self.flip,
        )

    def load(self, seed: int) -> FederatedData:
        """Return the set with its own test split; DataError if files are absent or damaged."""
        from fedlp.models.torchvision_compat import import_torchvision

        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fedlp" / self.name
        root = Path(self.root or cache).expanduser()
        remedy = (
            f"set dataset.root=PATH to a folder that torchvision.datasets.{self.torchvision_class} reads, "
            f"or allow dataset.download=true, which fetches {self.source}"
        )
        if not self.download and not root.is_dir():
            raise DataError(f"{self.name}: no folder {root}; {remedy}")
        loader = getattr(import_torchvision().datasets, self.torchvision_class)
        try:
            with _unpacked(root, self.torchvision_class) as folder:
                train = self._examples(loader(folder, train=True, download=self.download), self.num_train)
                test = self._examples(loader(folder, train=False), self.num_test)
        except Exception as error:  # torchvision lets anything through, from AssertionError to TarError
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{self.name}: cannot read {root} ({reason}); {remedy}") from error
        return FederatedData(self.describe(), *self.limit(train, test, seed))

    def _examples(self, dataset: Any, count: int) -> Examples:
        """Return the arrays behind a torchvision data set, channels first and without a copy."""
        import torch

        pixels: Tensor = torch.as_tensor(dataset.data)
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        targets: Tensor = torch.as_tensor(dataset.targets, dtype=torch.int64)
        if tuple(pixels.shape) != (count, *self.input_shape) or tuple(targets.shape) != (count,):
            raise DataError(f"found {tuple(pixels.shape)} images and {len(targets)} labels where {count} were expected")
        if int(targets.min()) < 0 or int(targets.max()) >= self.num_classes:
            raise DataError(f"found labels outside 0 to {self.num_classes - 1}")
        return Examples(pixels, targets, None)


@register("dataset", "cifar10")
@dataclass(frozen=True, kw_only=True)
class Cifar10(TorchvisionSet):
    """CIFAR-10: 60,000 colour images, 32 x 32, 10 classes."""

    name = "cifar10"
    torchvision_class = "CIFAR10"
    source = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    input_shape, num_train, num_test = (3, 32, 32), 50_000, 10_000
    own_mean, own_std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    flip = True


@register("dataset", "cifar100")
@dataclass(frozen=True, kw_only=True)
class Cifar100(TorchvisionSet):
    """CIFAR-100: 60,000 colour images, 32 x 32, 100 classes."""

    name = "cifar100"
    torchvision_class = "CIFAR100"
    source = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    input_shape, num_train, num_test = (3, 32, 32), 50_000, 10_000
    own_mean, own_std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    num_classes = 100
    flip = True


@register("dataset", "mnist")
@dataclass(frozen=True, kw_only=True)
class Mnist(TorchvisionSet):
    """MNIST: 70,000 handwritten digits, 28 x 28 grey pixels."""

    name = "mnist"
    torchvision_class = "MNIST"
    source = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    input_shape, num_train, num_test = (1, 28, 28), 60_000, 10_000
    own_mean, own_std = (0.1307,), (0.3081,)


@register("dataset", "fashion_mnist")
@dataclass(frozen=True, kw_only=True)
class FashionMnist(TorchvisionSet):
    """Fashion-MNIST: 70,000 articles of clothing, 28 x 28 grey pixels."""

    name = "fashion_mnist"
    torchvision_class = "FashionMNIST"
    source = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    input_shape, num_train, num_test = (1, 28, 28), 60_000, 10_000
    own_mean, own_std = (0.2860,), (0.3530,)
    flip = True


@contextmanager
def _unpacked(root: Path, name: str) -> Iterator[Path]:
    """Yield a root with unpacked MNIST files: ``root``, or a temporary copy if some are only gzipped there.

    torchvision unpacks only next to the packed file; ``root`` may be read-only.
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
