"""Classes of their own for each kind of device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import Examples
from fedlp.data.partitioners.dealing import Owners, check_mixrate, classes_of, deal_some, sorted_by_label
from fedlp.errors import ConfigError
from fedlp.registry import register


@register("partition", "devices")
@dataclass(frozen=True)
class Devices:
    """Classes of their own for each kind of device of the fleet, a share of the examples dealt at random.

    Attributes
    ----------
    mixrate : float
        Fraction of the examples that are divided by class, in [0, 1].
    """

    mixrate: float = 0.95

    def __post_init__(self) -> None:
        check_mixrate(self.mixrate)

    def __call__(self, train: Examples, kinds: NDArray[np.int64] | None, rng: np.random.Generator) -> Owners:
        """Return the client of every example; ``kinds`` is the kind of device of each client, (num_clients,)."""
        if kinds is None:
            raise ConfigError("partition=devices needs clients of different kinds; say fleet=tiers or fleet=mixed")
        return device_owners(classes_of(train, "devices"), kinds, self.mixrate, rng)


def device_owners(
    targets: NDArray[np.int64], kinds: NDArray[np.int64], mixrate: float, rng: np.random.Generator
) -> Owners:
    """Give each kind of device its own classes, which other kinds may never see.

    A fraction ``mixrate`` of the examples, sorted by class (classes in random order), is cut into one piece for each
    kind, in proportion to its clients, among whom each class of it is dealt evenly; all other examples are dealt at
    random to all. All clients get equally many, up to rounding.

    Parameters
    ----------
    kinds : (num_clients,) int64
        Kind of device of each client.
    """
    owners, rest = deal_some(len(targets), len(kinds), 1 - mixrate, rng)
    _, classes = np.unique(targets, return_inverse=True)
    rank = rng.permutation(classes.max() + 1)[classes]
    by_class = rest[sorted_by_label(rank[rest], rng)]
    members, counts = np.argsort(kinds, kind="stable"), np.unique(kinds, return_counts=True)[1]
    last = np.cumsum(counts)
    pieces = np.split(by_class, last[:-1] * len(rest) // len(kinds))
    for piece, clients in zip(pieces, np.split(members, last[:-1]), strict=True):
        owners[piece] = clients[np.arange(len(piece)) % len(clients)]
    return owners
