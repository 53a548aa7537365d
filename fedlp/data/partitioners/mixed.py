"""Label-sorted shards with a random share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import Examples
from fedlp.data.partitioners.dealing import Owners, check_mixrate, classes_of, deal_some
from fedlp.data.partitioners.shards import check_shards, shard_owners
from fedlp.registry import register


@register("partition", "mixed")
@dataclass(frozen=True)
class Mixed:
    """A fraction of the examples in label-sorted shards, the rest dealt at random: FedLP's M-niid.

    Attributes
    ----------
    mixrate : float
        Fraction of the examples in shards, in [0, 1].
    shards_per_client : int
        >= 1.
    """

    mixrate: float = 0.95
    shards_per_client: int = 2

    def __post_init__(self) -> None:
        check_mixrate(self.mixrate)
        check_shards(self.shards_per_client)

    def __call__(self, train: Examples, num_clients: int, rng: np.random.Generator) -> Owners:
        """Return the client of every example."""
        return mixed_owners(classes_of(train, "mixed"), num_clients, self.mixrate, self.shards_per_client, rng)


def mixed_owners(
    targets: NDArray[np.int64], num_clients: int, mixrate: float, shards_per_client: int, rng: np.random.Generator
) -> Owners:
    """FedLP's M-niid: a fraction ``mixrate`` of the examples in label-sorted shards, the rest dealt at random.

    With two shards a client and ``mixrate`` 0.95, two classes make up about 95 % of a client.

    Deviations
    ----------
    FedLP's code takes the random examples from the front of the data set and cuts the shards from all of it, so that
    about 5 % of the examples are given twice and as many to no client. Here the random part is a random subset, the
    shards are cut from the rest, and each example has exactly one owner.

    Raises
    ------
    DataError
        If there are fewer examples left than shards.
    """
    owners, rest = deal_some(len(targets), num_clients, 1 - mixrate, rng)
    if len(rest):
        owners[rest] = shard_owners(targets[rest], num_clients, shards_per_client, rng)
    return owners
