"""Folders of images: one folder for each class, of any sizes and formats."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import DataInfo, Examples, FederatedData, Rows
from fedlp.data.image_cache import SUFFIXES, Frame, cached_images, open_image
from fedlp.data.reader import HeldOut, channel_values, held_out_rows
from fedlp.errors import ConfigError, DataError, one_line
from fedlp.registry import register
from fedlp.rng import Stream, generator

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)
_TRAIN, _TESTS = "train", ("test", "val", "valid", "validation")


@dataclass(frozen=True, kw_only=True)
class ImageOptions(HeldOut):
    """Options of images that are decoded into one frame.

    Attributes
    ----------
    size : int or [height, width]
        Pixels after resizing.
    channels : int
        3 for colour, 1 for grey.
    fit : str
        "crop" keeps proportions and the middle; "stretch" keeps everything.
    augment : bool
        Whether training images are cropped at random after padding by ``padding`` pixels, and mirrored if ``flip``.
    mean, std : list of float or None
        Normalisation by channel on a [0, 1] scale; ImageNet's if None.
    labels : list of str or None
        Names of the classes in their order; sorted names of the folders if None.
    """

    size: int | list[int] = 64
    channels: int = 3
    fit: str = "crop"
    augment: bool = False
    padding: int = 4
    flip: bool = True
    mean: list[float] | None = None
    std: list[float] | None = None
    labels: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.normalisation()
        if self.padding < 0:
            raise ConfigError(f"dataset.padding={self.padding} is not allowed: it must be at least 0")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ConfigError("dataset.labels names a class twice")

    @property
    def frame(self) -> Frame:
        """Form of all images."""
        return Frame.of(self.size, self.channels, self.fit)

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and deviation by channel."""
        mean, std = (GREY_MEAN, GREY_STD) if self.frame.channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
        return channel_values("mean", self.mean, mean), channel_values("std", self.std, std)

    def info(self, name: str, labels: Sequence[str]) -> DataInfo:
        """Return the facts of images with these classes."""
        mean, std = self.normalisation()
        return DataInfo(
            name=name,
            task="classification",
            input_shape=self.frame.shape,
            num_classes=len(labels),
            num_train=None,
            num_test=None,
            mean=mean,
            std=std,
            augment=self.augment,
            padding=self.padding,
            flip=self.flip,
            labels=tuple(labels),
        )


@register("dataset", "imagefolder")
@dataclass(frozen=True, kw_only=True)
class ImageFolder(ImageOptions):
    """Images of any size in a folder for each class (PNG, JPEG, ...), decoded once into a memory-mapped file.

    Where the folder holds ``train`` and ``test`` (or ``val``), these hold the folders of classes, and nothing else is
    held out.

    Attributes
    ----------
    path : str
        The folder.
    client_pattern : str or None
        Regular expression that is searched in each path below the folder; its first group (or all of it) names the
        client that owns the image, for ``partition=natural`` and ``partition=column``.
    """

    path: str | None = None
    client_pattern: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.client_pattern or "")
        except re.error as error:
            raise ConfigError(
                f"dataset.client_pattern={self.client_pattern} is no regular expression: {error}"
            ) from error

    def describe(self) -> DataInfo:
        """Return the facts; lists folders, opens no image."""
        return self.info("imagefolder", self.labels or self._labels_of(self._parts()))

    def facts(self) -> dict[str, Any]:
        """Return the options that describe this folder where it is not read."""
        return {"labels": list(self.describe().labels)}

    def load(self, seed: int) -> FederatedData:
        """Return the images, split by the seed where the folder has no test part; classes are held out in proportion.

        Raises
        ------
        DataError
            If the folder is absent or empty, a class is unknown, or an image cannot be decoded; names it.
        """
        parts = self._parts()
        labels = list(self.labels or self._labels_of(parts))
        read = [self._read(folder, labels) for folder in parts]
        if len(read) == 2:
            train, test = read
        else:
            held_out = held_out_rows(read[0].targets.numpy(), self.test_fraction, generator(seed, Stream.DATA, 0))
            train, test = (read[0].select(np.flatnonzero(rows)) for rows in (~held_out, held_out))
        return FederatedData(self.info("imagefolder", labels), *self.limit(train, test, seed))

    def _parts(self) -> list[Path]:
        """Return the folders of training and test images, or the one of all."""
        if self.path is None:
            raise ConfigError("dataset=imagefolder needs dataset.path: a folder with a folder of images for each class")
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise DataError(f"imagefolder: no folder {root}; set dataset.path to a folder with a folder for each class")
        test = next((root / name for name in _TESTS if (root / name).is_dir()), None)
        return [root / _TRAIN, test] if test is not None and (root / _TRAIN).is_dir() else [root]

    @staticmethod
    def _labels_of(parts: Sequence[Path]) -> list[str]:
        """Return the sorted names of the folders of classes, with images or without."""
        names = {entry.name for part in parts for entry in _entries(part) if entry.is_dir()}
        labels = sorted(name for name in names if not name.startswith("."))
        if not labels:
            raise DataError(f"imagefolder: {parts[0]} holds no folder; put the images of each class in one of its own")
        return labels

    def _read(self, folder: Path, labels: Sequence[str]) -> Examples:
        """Return the images below a folder, in the order of their paths."""
        import torch

        files = [(path, stat) for path, stat in _files(folder)]
        names = [str(path.relative_to(folder)) for path, _ in files]
        classes = [Path(name).parts[0] for name in names]
        self._check(folder, classes, labels)
        number = {label: index for index, label in enumerate(labels)}
        key = [
            str(folder.absolute()),
            [(name, size, time) for name, (_, (size, time)) in zip(names, files, strict=True)],
        ]
        open_file = partial(_open, [path for path, _ in files])
        pixels = cached_images(open_file, names, self.frame, key, label=f"decoding {folder}")
        rows = cast("Tensor", Rows(pixels, torch.arange(len(files))))
        return Examples(rows, torch.tensor([number[name] for name in classes]), self._owners(names))

    def _check(self, folder: Path, classes: Sequence[str], labels: Sequence[str]) -> None:
        counts = Counter(classes)
        if unknown := sorted(set(counts) - set(labels)):
            raise DataError(
                f"imagefolder: {folder} has {counts[unknown[0]]} images of the unknown class {unknown[0]}; the classes "
                f"are {', '.join(labels)}: add it to dataset.labels, or remove it"
            )
        if len(classes) < 2:
            raise DataError(
                f"imagefolder: {folder} holds {len(classes)} images; give at least 2 ({', '.join(SUFFIXES)})"
            )

    def _owners(self, names: Sequence[str]) -> NDArray[np.int64] | None:
        """Return the number of each image's client, in the order of their names."""
        if self.client_pattern is None:
            return None
        found = [re.search(self.client_pattern, name) for name in names]
        if None in found:
            raise DataError(
                f"imagefolder: {names[found.index(None)]} does not match dataset.client_pattern={self.client_pattern}"
            )
        owners = [match[1] if match.re.groups else match[0] for match in found if match is not None]
        return np.unique(owners, return_inverse=True)[1].astype(np.int64)


def _open(paths: Sequence[Path], number: int):  # type: ignore[no-untyped-def]
    return open_image(paths[number])


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"imagefolder: {folder} cannot be read ({one_line(error)})") from error


def _files(folder: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Yield the images in the folders of classes, however deep, with size and time of change."""
    for entry in _entries(folder):
        if entry.is_dir():
            for path in sorted(Path(entry.path).rglob("*")):
                if path.suffix.lower() in SUFFIXES and path.is_file():
                    stat = path.stat()
                    yield path, (stat.st_size, stat.st_mtime_ns)
