"""Arrays in files of NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
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
    shape : list of int or None
        Shape of one example as the model reads it, images channels first, texts without the token that is predicted
        last; that of the file where None. With ``task`` and ``num_outputs`` (or ``labels``) it describes the data
        where no file is read.
    num_outputs : int or None
        Number of classes, labels, values or tokens; as many as the file has where None.
    labels : list of str or None
        Names of the classes or labels, in their order.
    vocabulary : int or None
        Number of tokens of classified texts; as many as the file has where None.
    """

    path: str | None = None
    task: str = "auto"
    shape: list[int] | None = None
    num_outputs: int | None = None
    labels: list[str] | None = None
    vocabulary: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    augment: bool = False
    padding: int = 4
    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape is not None and (not self.shape or min(self.shape) < 1):
            raise ConfigError(f"dataset.shape={self.shape} is not allowed: it must be sizes of at least 1")
        for name in ("num_outputs", "vocabulary"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ConfigError(f"dataset.{name}={count} is not allowed: it must be at least 1")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ConfigError("dataset.labels names a class twice")
        if self.labels and self.num_outputs not in (None, len(self.labels)):
            raise ConfigError(
                f"dataset.num_outputs={self.num_outputs}, but dataset.labels has {len(self.labels)} names"
            )

    def describe(self) -> DataInfo:
        """Return the facts; reads the arrays, but where there is no file and the options tell all."""
        if self.path is None and self.shape is not None:
            return self._normalised(self._described_by_options())
        parts = self._parts
        return self._info(parts["train"], parts.get("test"))

    def load(self, seed: int) -> FederatedData:
        """Return the examples, split by the seed if there are no test arrays."""
        parts = self._parts
        del vars(self)["_parts"]  # only what is returned stays in memory
        info, train = self._info(parts["train"], parts.get("test")), parts["train"]
        if "test" in parts:
            test = parts["test"]
        else:
            classes = train.targets.numpy() if info.task == "classification" else np.zeros(len(train), dtype=np.int64)
            held_out = held_out_rows(classes, self.test_fraction, generator(seed, Stream.DATA, 0))
            train, test = (train.select(np.flatnonzero(rows)) for rows in (~held_out, held_out))
        return FederatedData(info, *self.limit(train, test, seed))

    def facts(self) -> dict[str, Any]:
        """Return the options that describe these arrays where they are not read."""
        info = self.describe()
        found = {"task": str(info.task), "shape": list(info.input_shape), "num_outputs": info.num_classes}
        return found | ({"vocabulary": info.vocabulary} if info.vocabulary else {})

    @property
    def _outputs(self) -> int | None:
        return len(self.labels) if self.labels else self.num_outputs

    def _described_by_options(self) -> DataInfo:
        """Return the facts that options alone give; ConfigError where one is absent."""
        wanted = {"task": self.task != "auto", "num_outputs": self._outputs is not None}
        wanted["vocabulary"] = self.task != "sequence_classification" or self.vocabulary is not None
        if missing := [name for name, is_there in wanted.items() if not is_there]:
            raise ConfigError(f"dataset=arrays without a file needs dataset.{missing[0]}")
        assert self._outputs is not None
        return DataInfo(
            name="arrays",
            task=self.task,
            input_shape=tuple(self.shape or ()),
            num_classes=self._outputs,
            num_train=None,
            num_test=None,
            vocabulary=self.vocabulary,
            labels=tuple(self.labels or ()),
        )

    def _info(self, train: Examples, test: Examples | None) -> DataInfo:
        found = describe_examples("arrays", train, test, None if self.task == "auto" else self.task)
        found = found if test is not None else replace(found, num_train=None, num_test=None)
        return self._normalised(self._as_asked(found))

    def _as_asked(self, found: DataInfo) -> DataInfo:
        """Return the facts with the options' numbers; DataError where the arrays do not fit them."""
        if self.shape is not None and tuple(self.shape) != found.input_shape:
            raise DataError(
                f"{self.path}: examples have shape {list(found.input_shape)}, but dataset.shape={self.shape}"
            )
        counts = {"num_outputs": (found.num_classes, self._outputs), "vocabulary": (found.vocabulary, self.vocabulary)}
        for name, (there, asked) in counts.items():
            is_exact = name == "num_outputs" and found.task in ("regression", "multi_label")
            if there is not None and asked is not None and (there > asked or (is_exact and there != asked)):
                what = {"num_outputs": "outputs" if is_exact else "classes", "vocabulary": "tokens"}[name]
                raise DataError(
                    f"{self.path} has {there} {what}, but the config says {asked} (dataset.{name} or labels)"
                )
        return replace(
            found,
            num_classes=self._outputs or found.num_classes,
            vocabulary=found.vocabulary and (self.vocabulary or found.vocabulary),
            labels=tuple(self.labels or ()),
        )

    def _normalised(self, found: DataInfo) -> DataInfo:
        """Return the facts with normalisation and augmentation."""
        sizes = (0.0,) * found.input_shape[0]
        mean = () if self.mean is None else channel_values("mean", self.mean, sizes)
        std = () if self.std is None else channel_values("std", self.std, sizes)
        if bool(mean) != bool(std):
            raise ConfigError("dataset.mean and dataset.std are given together")
        return replace(found, mean=mean, std=std, augment=self.augment, padding=self.padding, flip=self.flip)

    @cached_property
    def _parts(self) -> dict[str, Examples]:
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
