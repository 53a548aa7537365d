"""scikit-learn's embedded handwritten digits."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import DataInfo, Examples, FederatedData
from fedlp.data.reader import HeldOut, channel_values, held_out_rows
from fedlp.registry import register
from fedlp.rng import Stream, generator

_COUNT, _SHAPE = 1797, (1, 8, 8)
_MEAN, _STD = (0.3053,), (0.3759,)  # of all pixels on a [0, 1] scale


@register("dataset", "digits")
@dataclass(frozen=True, kw_only=True)
class Digits(HeldOut):
    """1,797 handwritten digits, 8 x 8 grey pixels, embedded in scikit-learn; needs no network.

    Attributes
    ----------
    augment : bool
        Whether training images are cropped at random after padding by one pixel.
    mean, std : list of float or None
        Normalisation on a [0, 1] scale; the data set's own if None.
    """

    test_fraction: float = 0.2
    augment: bool = False
    mean: list[float] | None = None
    std: list[float] | None = None

    def describe(self) -> DataInfo:
        """Return the facts; touches no file."""
        num_test = min(max(round(self.test_fraction * _COUNT), 1), _COUNT - 1)
        num_train = _COUNT - num_test
        return DataInfo(
            name="digits",
            task="classification",
            input_shape=_SHAPE,
            num_classes=10,
            num_train=min(num_train, self.max_train_examples or num_train),
            num_test=min(num_test, self.max_test_examples or num_test),
            mean=channel_values("mean", self.mean, _MEAN),
            std=channel_values("std", self.std, _STD),
            augment=self.augment,
            padding=1,
        )

    def load(self, seed: int) -> FederatedData:
        """Return the digits, split by the seed; every class is held out in proportion."""
        import torch

        images, targets = read_digits()
        pixels = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, *_SHAPE)
        whole = Examples(torch.from_numpy(pixels), torch.from_numpy(targets.astype(np.int64)), None)
        held_out = held_out_rows(targets, self.test_fraction, generator(seed, Stream.DATA, 0))
        train, test = (whole.select(np.flatnonzero(rows)) for rows in (~held_out, held_out))
        return FederatedData(self.describe(), *self.limit(train, test, seed))


def read_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return images, (n, 64) of 0 to 16, and classes, (n,), from scikit-learn's file: its import takes a second."""
    package = find_spec("sklearn")
    for folder in package.submodule_search_locations or () if package else ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            with gzip.open(path, "rt") as file:
                table = np.loadtxt(file, delimiter=",")
            return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    found: tuple[NDArray[np.float64], NDArray[np.int64]] = load_digits(return_X_y=True)
    return found
