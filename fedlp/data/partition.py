"""Partition of the training examples among clients."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlp.errors import ConfigError, DataError
from fedlp.rng import Stream, generator

if TYPE_CHECKING:
    from fedlp.config import PartitionConfig
    from fedlp.data.examples import Examples


def partition_examples(
    config: PartitionConfig,
    examples: Examples,
    num_clients: int,
    seed: int,
    kinds: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], ...]:
    """Return each client's examples: sorted indices, disjoint, together all of them.

    Parameters
    ----------
    kinds : (num_clients,) int64, optional
        Kind of device of each client; only ``devices`` needs it.

    Raises
    ------
    ConfigError
        If a value is out of range, or the data lack a partitioner's requirement.
    DataError
        If there are too few examples or natural owners, or a client would get fewer than ``min_examples``.
    """
    if num_clients < 1:
        raise ConfigError(f"num_clients is {num_clients}; it must be at least 1")
    count = len(examples)
    if num_clients > count and config.min_examples > 0:
        raise DataError(
            f"{num_clients} clients cannot share {count} examples; lower num_clients, use more data, or set "
            "partition.min_examples=0"
        )
    given = {
        "train": examples,
        "num_clients": num_clients,
        "seed": seed,
        "rng": generator(seed, Stream.PARTITION),
        "kinds": kinds,
    }
    part = config.make()
    taken = inspect.signature(part).parameters
    found = part(**{name: value for name, value in given.items() if name in taken})
    parts = _as_parts(found, count, num_clients, config.name)
    sizes = [len(indices) for indices in parts]
    if min(sizes) < config.min_examples:
        raise DataError(
            f"partition={config.name} gives client {int(np.argmin(sizes))} {min(sizes)} examples, fewer than "
            f"partition.min_examples={config.min_examples}; lower that (0: clients without examples take no part) or "
            "num_clients"
        )
    return parts


def _as_parts(found: Any, count: int, num_clients: int, name: str) -> tuple[NDArray[np.int64], ...]:
    """Return sorted indices by client from owners, or from indices by client; DataError otherwise."""
    if isinstance(found, np.ndarray) and found.shape == (count,) and found.dtype.kind in "iu":
        if count and not 0 <= int(found.min()) <= int(found.max()) < num_clients:
            raise DataError(f"partition={name} names clients {found.min()} to {found.max()}, of {num_clients}")
        sizes = np.bincount(found, minlength=num_clients)
        return tuple(np.split(np.argsort(found, kind="stable"), np.cumsum(sizes)[:-1]))
    try:
        parts = tuple(np.sort(np.asarray(indices, dtype=np.int64)) for indices in found)
    except (TypeError, ValueError) as error:
        raise DataError(f"partition={name} gives a {type(found).__name__}, not the client of every example") from error
    given = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    if len(parts) != num_clients or len(np.unique(given)) != len(given) or ((given < 0) | (given >= count)).any():
        raise DataError(
            f"partition={name} gives {len(parts)} lists of indices; there must be one for each of {num_clients} "
            f"clients, each index in [0, {count}) at most once"
        )
    return parts
