"""Examples dealt at random."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlp.data.examples import Examples
from fedlp.data.partitioners.dealing import Owners
from fedlp.registry import register


@register("partition", "iid")
@dataclass(frozen=True)
class Iid:
    """Examples dealt at random, equally many to each client."""

    def __call__(self, train: Examples, num_clients: int, rng: np.random.Generator) -> Owners:
        """Return the client of every example."""
        return iid_owners(len(train), num_clients, rng)


def iid_owners(count: int, num_clients: int, rng: np.random.Generator) -> Owners:
    """Deal ``count`` examples at random; sizes differ by at most one."""
    return rng.permutation(count) % num_clients
