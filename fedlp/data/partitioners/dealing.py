"""Shared parts of partitioners: classes in random order, and a random share dealt evenly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import Examples
from fedlp.errors import ConfigError, DataError

Owners = NDArray[np.int64]
"""Client of every example."""


def classes_of(train: Examples, name: str) -> NDArray[np.int64]:
    """Return the class of every example; DataError if targets are not classes."""
    if train.targets.ndim != 1 or train.targets.is_floating_point():
        raise DataError(
            f"partition={name} divides classes, but each example has values or several labels; choose partition=iid, "
            "column or natural"
        )
    return train.targets.numpy()


def check_mixrate(mixrate: float) -> None:
    """Raise ConfigError for a share outside [0, 1]."""
    if not 0 <= mixrate <= 1:
        raise ConfigError(f"partition.mixrate is {mixrate}; it must be in [0, 1]")


def deal_some(count: int, num_clients: int, share: float, rng: np.random.Generator) -> tuple[Owners, Owners]:
    """Deal a share of the examples at random; return all owners, unset for the rest, and the indices of the rest."""
    dealt, rest = np.split(rng.permutation(count), [round(share * count)])
    owners: Owners = np.empty(count, dtype=np.int64)
    owners[dealt] = np.arange(len(dealt)) % num_clients
    return owners, rest


def sorted_by_label(targets: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return indices that sort by label, in random order within a label."""
    order = rng.permutation(len(targets))
    return order[np.argsort(targets[order], kind="stable")]
