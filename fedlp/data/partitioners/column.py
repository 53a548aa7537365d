"""Partition by a column: one client for each value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlp.data.examples import Examples
from fedlp.data.partitioners.dealing import Owners
from fedlp.errors import ConfigError, DataError
from fedlp.registry import register


@register("partition", "column")
@dataclass(frozen=True)
class Column:
    """One client for each value of the data set's client column, in the order of the values."""

    def __call__(self, train: Examples, num_clients: int) -> Owners:
        """Return the client of every example."""
        if train.groups is None:
            raise DataError(
                "partition=column needs a column of clients; name it (dataset.client, dataset.client_column, "
                "dataset.client_pattern, or the array client)"
            )
        values, owners = np.unique(train.groups, return_inverse=True)
        if len(values) != num_clients:
            raise ConfigError(
                f"num_clients={num_clients}, but the column of clients has {len(values)} values in the training part; "
                f"set num_clients={len(values)}, or partition=natural to merge them"
            )
        return owners.astype(np.int64)
