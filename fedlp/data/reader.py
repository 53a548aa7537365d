"""The protocol of data sets: facts that need no examples, then the examples.

A reader is registered as ``@register("dataset", NAME)``: a frozen dataclass whose fields are its options. A function
that returns data, in any form of :func:`fedlp.data.conversion.as_examples`, is a data set as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import DataInfo, Examples, FederatedData, subset
from fedlp.errors import ConfigError
from fedlp.rng import Stream, generator


@runtime_checkable
class Reader(Protocol):
    """A data set by its options.

    A reader whose option is ``path`` or ``root`` may have a method ``facts``: the options by which ``describe`` gives
    the same facts where that place is None, as on devices that bring data of their own.
    """

    def describe(self) -> DataInfo:
        """Return the facts that a model needs; reads as little as they ask for.

        Raises
        ------
        DataError
            If files that hold them are absent or damaged.
        """

    def load(self, seed: int) -> FederatedData:
        """Return the examples; the same options and seed give the same examples in the same order.

        Raises
        ------
        DataError
            If files are absent, damaged, unreadable or too few; says where it looked and how to get them.
        """


@dataclass(frozen=True, kw_only=True)
class Limited:
    """Options of all built-in readers.

    Attributes
    ----------
    max_train_examples, max_test_examples : int or None
        Size of a random subset, kept in the order of the whole set; all examples if None.
    """

    max_train_examples: int | None = None
    max_test_examples: int | None = None

    def __post_init__(self) -> None:
        for key in ("max_train_examples", "max_test_examples"):
            limit = getattr(self, key)
            if limit is not None and limit < 1:
                raise ConfigError(f"dataset.{key} is {limit}; it must be at least 1, or null for all")

    def limit(self, train: Examples, test: Examples, seed: int) -> tuple[Examples, Examples]:
        """Return at most as many examples as the options allow, drawn by the seed."""
        return (
            subset(train, self.max_train_examples, generator(seed, Stream.DATA, 1)),
            subset(test, self.max_test_examples, generator(seed, Stream.DATA, 2)),
        )


@dataclass(frozen=True, kw_only=True)
class HeldOut(Limited):
    """Options of readers of data without a test split of their own.

    Attributes
    ----------
    test_fraction : float
        Share of the examples that is held out for testing, in (0, 1).
    """

    test_fraction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"dataset.test_fraction is {self.test_fraction}; it must be in (0, 1)")


def held_out_rows(strata: NDArray[np.int64], fraction: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return which examples are held out; every stratum (class or client) in proportion, within one example.

    Parameters
    ----------
    strata : (n,) int64
        Stratum of each example, n >= 2.
    """
    count = len(strata)
    size = min(max(round(fraction * count), 1), count - 1)
    order = rng.permutation(count)
    order = order[np.argsort(strata[order], kind="stable")]
    held_out: NDArray[np.bool_] = np.zeros(count, dtype=np.bool_)
    held_out[order[np.arange(size) * count // size]] = True
    return held_out


def channel_values(name: str, given: Sequence[float] | None, own: tuple[float, ...]) -> tuple[float, ...]:
    """Return the configured normalisation, or the data set's own."""
    if given is None:
        return own
    if (
        len(given) != len(own)
        or not all(math.isfinite(value) for value in given)
        or (name == "std" and min(given) <= 0)
    ):
        raise ConfigError(
            f"dataset.{name}={list(given)} is not allowed: it must be {len(own)} finite numbers"
            + (" above 0" if name == "std" else "")
        )
    return tuple(given)
