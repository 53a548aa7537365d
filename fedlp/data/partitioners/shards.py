"""Label-sorted shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import Examples
from fedlp.data.partitioners.dealing import Owners, classes_of, sorted_by_label
from fedlp.errors import ConfigError, DataError
from fedlp.registry import register


@register("partition", "shards")
@dataclass(frozen=True)
class Shards:
    """A few label-sorted shards for each client.

    Attributes
    ----------
    shards_per_client : int
        >= 1.
    """

    shards_per_client: int = 2

    def __post_init__(self) -> None:
        check_shards(self.shards_per_client)

    def __call__(self, train: Examples, num_clients: int, rng: np.random.Generator) -> Owners:
        """Return the client of every example."""
        return shard_owners(classes_of(train, "shards"), num_clients, self.shards_per_client, rng)


def check_shards(shards_per_client: int) -> None:
    """Raise ConfigError for less than one shard per client."""
    if shards_per_client < 1:
        raise ConfigError(f"partition.shards_per_client is {shards_per_client}; it must be at least 1")


def shard_owners(
    targets: NDArray[np.int64], num_clients: int, shards_per_client: int, rng: np.random.Generator
) -> Owners:
    """Cut the label-sorted examples into shards, sizes differing by at most one, and deal them at random.

    The pathological split of McMahan et al. 2017 (arXiv 1602.05629): few classes a client.

    Raises
    ------
    DataError
        If there are fewer examples than shards.
    """
    num_shards = num_clients * shards_per_client
    if len(targets) < num_shards:
        raise DataError(
            f"{num_clients} clients x partition.shards_per_client={shards_per_client} is more shards than the "
            f"{len(targets)} examples to be cut; lower one of them"
        )
    owner_of_shard = rng.permutation(num_shards) % num_clients
    owners: Owners = np.empty(len(targets), dtype=np.int64)
    owners[sorted_by_label(targets, rng)] = owner_of_shard[np.arange(len(targets)) * num_shards // len(targets)]
    return owners
