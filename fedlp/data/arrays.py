"""Arrays in files of NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedlp.data.conversion import as_examples, describe_examples
from fedlp.data.examples import DataInfo, Examples, FederatedData
from fedlp.data.reader import HeldOut, channel_values, held_out_rows
from fedlp.errors import ConfigError, DataError, one_line
from fedlp.registry import register
from fedlp.rng import Stream, generator

_INPUTS, _TARGETS, _CLIENTS = ("x", "X", "inputs"), ("y", "Y", "targets", "labels"), ("client", "clients", "groups")


@register("dataset", "arrays")
@dataclass(frozen=True, kw_only=True)
class Arrays(HeldOut):
    """Arrays in an ``.npz`` file, or in a folder of ``.npy`` files.

    The arrays are ``x`` and ``y``, or ``x_train``, ``y_train``, ``x_test`` and ``y_test``; ``client`` or
    ``client_train`` numbers the client of each example. Images are uint8, channels first or last.

    Attributes
    ----------
    path : str
        The file or folder.
    task : str
        Name of the task; found from the targets where "auto".
    mean, std : list of float or None
        Normalisation along the second dimension (channels, features); of images on a [0, 1] scale. None: no
        normalisation, except images' [0, 1] scale.
    augment : bool
        Whether training images are cropped at random after padding by ``padding`` pixels, and mirrored if ``flip``.
    """

    path: str | None = None
    task: str = "auto"
    mean: list[float] | None = None
    std: list[float] | None = None
    augment: bool = False
    padding: int = 4
    flip: bool = False

    def describe(self) -> DataInfo:
        """Return the facts; reads the arrays."""
        parts = self._read()
        return self._info(parts["train"], parts.get("test"))

    def load(self, seed: int) -> FederatedData:
        """Return the examples, split by the seed if there are no test arrays."""
        parts = self._read()
        info, train = self._info(parts["train"], parts.get("test")), parts["train"]
        if "test" in parts:
            test = parts["test"]
        else:
            classes = train.targets.numpy() if info.task == "classification" else np.zeros(len(train), dtype=np.int64)
            held_out = held_out_rows(classes, self.test_fraction, generator(seed, Stream.DATA, 0))
            train, test = (train.select(np.flatnonzero(rows)) for rows in (~held_out, held_out))
        return FederatedData(info, *self.limit(train, test, seed))

    def _info(self, train: Examples, test: Examples | None) -> DataInfo:
        found = describe_examples("arrays", train, test, None if self.task == "auto" else self.task)
        sizes = (0.0,) * found.input_shape[0]
        mean = () if self.mean is None else channel_values("mean", self.mean, sizes)
        std = () if self.std is None else channel_values("std", self.std, sizes)
        if bool(mean) != bool(std):
            raise ConfigError("dataset.mean and dataset.std are given together")
        counted = found if test is not None else replace(found, num_train=None, num_test=None)
        return replace(counted, mean=mean, std=std, augment=self.augment, padding=self.padding, flip=self.flip)

    def _read(self) -> dict[str, Examples]:
        """Return the examples of ``train`` and, if present, ``test``."""
        found = self._load()
        parts = {}
        for part, ending in (("train", ""), ("train", "_train"), ("test", "_test")):
            inputs, targets, clients = (_pick(found, names, ending) for names in (_INPUTS, _TARGETS, _CLIENTS))
            if inputs is None:
                continue
            if targets is None:
                raise DataError(f"{self.path} has inputs but no y{ending}; it has {', '.join(found)}")
            examples = as_examples((inputs, targets), what=f"{self.path} ({part})")
            groups = None if clients is None else np.unique(clients, return_inverse=True)[1].astype(np.int64)
            if groups is not None and len(groups) != len(examples):
                raise DataError(f"{self.path}: {len(groups)} clients for {len(examples)} examples; give one for each")
            parts[part] = replace(examples, groups=groups)
        if "train" not in parts:
            raise DataError(
                f"{self.path} has no x and y, nor x_train and y_train; it has {', '.join(found) or 'nothing'}"
            )
        return parts

    def _load(self) -> Mapping[str, NDArray[Any]]:
        if self.path is None:
            raise ConfigError("dataset=arrays needs dataset.path: an .npz file, or a folder of .npy files")
        place = Path(self.path).expanduser()
        if not place.exists():
            raise DataError(f"arrays: there is no {place}; set dataset.path to an .npz file or a folder of .npy files")
        try:
            if place.is_dir():
                return {
                    file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in sorted(place.glob("*.npy"))
                }
            with np.load(place, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except (OSError, ValueError, BadZipFile) as error:
            raise DataError(f"{place} cannot be read as arrays of numbers: {one_line(error)}") from error


def _pick(found: Mapping[str, NDArray[Any]], names: tuple[str, ...], ending: str) -> NDArray[Any] | None:
    return next((found[name + ending] for name in names if name + ending in found), None)
