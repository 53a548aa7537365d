"""Natural owners of the examples."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import Examples
from fedlp.data.partitioners.dealing import Owners
from fedlp.errors import DataError
from fedlp.registry import register


@register("partition", "natural")
@dataclass(frozen=True)
class Natural:
    """One client for each natural owner (document, speaker, writer); the smaller owners are merged."""

    def __call__(self, train: Examples, num_clients: int) -> Owners:
        """Return the client of every example."""
        if train.groups is None:
            raise DataError(
                "partition=natural needs a data set whose examples have owners (topics, text, hf, or a column of "
                "clients); use another"
            )
        return natural_owners(train.groups, num_clients)


def natural_owners(groups: NDArray[np.int64], num_clients: int) -> Owners:
    """Give each natural owner's examples to one client, whole; takes no random numbers.

    Owners are merged, the largest first to the client with the fewest examples so far, where there are more of them
    than clients. Clients are numbered in the order of their first owner: without merging, client ``i`` is owner ``i``.

    Raises
    ------
    DataError
        If there are more clients than owners.
    """
    names, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if num_clients > len(names):
        raise DataError(f"{num_clients} clients but {len(names)} natural owners of examples; lower num_clients")
    clients: Owners = np.empty(len(names), dtype=np.int64)
    load = [(0, client) for client in range(num_clients)]
    for owner in np.argsort(-sizes, kind="stable"):
        total, client = load[0]
        heapq.heapreplace(load, (total + int(sizes[owner]), client))
        clients[owner] = client
    first = np.unique(clients, return_index=True)[1]
    return np.argsort(np.argsort(first))[clients][group]
