"""Shards: training and held-out test examples of each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import Examples
from fedlp.data.reader import held_out_rows
from fedlp.errors import DataError
from fedlp.rng import Stream, generator

Indices = NDArray[np.int64]


class Shards:
    """Examples of each client, cut from one data set on demand.

    Parameters
    ----------
    examples : Examples
        Examples of all clients.
    parts : sequence or mapping of (n_k,) arrays
        Indices of each client's examples, by client id.
    test_fraction : float
        Held-out share of each client's examples, in [0, 1); classes in proportion. A client with one example
        holds out none.
    seed : int
        Seed of the split's stream, keyed on the client: the same in every round.
    """

    def __init__(
        self,
        examples: Examples,
        parts: Sequence[Indices] | Mapping[int, Indices],
        test_fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._examples, self._test_fraction, self._seed = examples, test_fraction, seed
        self._parts = dict(parts) if isinstance(parts, Mapping) else dict(enumerate(parts))
        self._split = cache(self._split_part)

    def size(self, client_id: int) -> int:
        """Return the number of a client's training examples; DataError if there is no such client."""
        return len(self._part(client_id)) - self.test_size(client_id)

    def test_size(self, client_id: int) -> int:
        """Return the number of a client's test examples; DataError where there is no such client."""
        part = self._part(client_id)
        return len(self._split(client_id)[1]) if self._test_fraction and len(part) else 0

    def of(self, client_id: int) -> Examples:
        """Return a client's training examples."""
        return self._examples.select(self._split(client_id)[0])

    def joined(self, client_ids: Sequence[int]) -> tuple[Examples, list[int]]:
        """Return the training examples of several clients, one after another, and the number of each, >= 1.

        Raises
        ------
        DataError
            If there is no such client, or it has no examples.
        """
        parts = [self._split(client_id)[0] for client_id in client_ids]
        lengths = [len(part) for part in parts]
        if not min(lengths):
            raise DataError(f"client {client_ids[lengths.index(0)]} has no examples")
        return self._examples.select(np.concatenate(parts)), lengths

    def test_of(self, client_id: int) -> Examples:
        """Return a client's test examples; DataError if it has none."""
        held_out = self._split(client_id)[1]
        if not len(held_out):
            raise DataError(f"client {client_id} holds out no example; it has too few examples")
        return self._examples.select(held_out)

    def _split_part(self, client_id: int) -> tuple[Indices, Indices]:
        """Return the indices of a client's training and test examples, in their order."""
        part = self._part(client_id)
        if not self._test_fraction or len(part) < 2:
            return part, part[:0]
        targets = self._examples.targets
        is_class = targets.ndim == 1 and not targets.is_floating_point()
        strata = targets.numpy()[part] if is_class else np.zeros(len(part), dtype=np.int64)
        rng = generator(self._seed, Stream.CLIENT_TEST, client_id)
        held_out = held_out_rows(strata, self._test_fraction, rng)
        return part[~held_out], part[held_out]

    def _part(self, client_id: int) -> Indices:
        """Return the indices of all examples of a client."""
        if client_id not in self._parts:
            raise DataError(
                f"there is no client {client_id}: num_clients={len(self._parts)}; give it another partition-id"
            )
        return self._parts[client_id]
