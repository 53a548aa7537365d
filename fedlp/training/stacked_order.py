"""Batches of several clients: which examples of which client every step reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedlp.config import LocalConfig
from fedlp.training.batches import batch_sizes

Indices = NDArray[np.int64]


class BatchOrder:
    """Batches of several clients, whose examples lie one after another.

    Seeds and orders are those of training alone, see ``draw_batches``.

    Parameters
    ----------
    lengths : sequence of int
        Examples of each client, >= 1.
    rngs : iterable of numpy Generator
        Of each client, at its start. Read one by one, so that one generator may be set anew for each client.
    draws_later : bool
        Whether the generators are used between batches as well: then each epoch is drawn when it begins.

    Attributes
    ----------
    seeds : list of int
        Seed of each client's dropout.
    steps : (clients,)
        Number of steps of each client.
    counts : (clients, steps)
        Examples of each client's batches; 0 after its last one.
    """

    def __init__(
        self, lengths: Sequence[int], config: LocalConfig, rngs: Iterable[np.random.Generator], draws_later: bool
    ) -> None:
        self._lengths, self._epochs = lengths, config.epochs
        starts = np.cumsum([0, *lengths])[:-1]
        self._firsts, self._bases = starts, config.epochs * starts  # of each client's examples, and of its order
        self._order = np.empty(config.epochs * sum(lengths), dtype=np.int64)
        sizes = {length: np.tile(batch_sizes(length, config.batch_size), config.epochs) for length in set(lengths)}
        self.steps = np.array([len(sizes[length]) for length in lengths])
        self.counts = np.zeros((len(lengths), int(self.steps.max())), dtype=np.int64)
        for k, length in enumerate(lengths):
            self.counts[k, : self.steps[k]] = sizes[length]
        self._offsets = np.cumsum(self.counts, axis=1) - self.counts
        self.seeds: list[int] = []
        self.rngs: list[np.random.Generator] = []
        for k, rng in enumerate(rngs):
            self.seeds.append(int(rng.integers(2**63 - 1)))
            if draws_later:
                self.rngs.append(rng)
            else:
                self._draw(k, range(config.epochs), rng)

    def _draw(self, k: int, epochs: Iterable[int], rng: np.random.Generator) -> None:
        base, length, first = self._bases[k], self._lengths[k], self._firsts[k]
        for epoch in epochs:
            start = base + epoch * length
            self._order[start : start + length] = rng.permutation(length)
            self._order[start : start + length] += first

    def begin(self, step: int) -> None:
        """Draw the epochs that begin with a step; nothing where they are drawn."""
        for k, rng in enumerate(self.rngs):
            per_epoch = int(self.steps[k]) // self._epochs
            if step < self.steps[k] and step % per_epoch == 0:
                self._draw(k, (step // per_epoch,), rng)

    def index(self, step: int, members: Indices, rows: int) -> Indices:
        """Return the examples of some clients' batches, (members, rows); a batch is padded with its first example."""
        at = np.arange(rows)
        inside = np.where(at < self.counts[members, step][:, None], at, 0)
        found: Indices = self._order[(self._bases[members] + self._offsets[members, step])[:, None] + inside]
        return found

    def last_epoch(self) -> Indices:
        """Return the sizes of the batches of each client's last epoch, (clients, steps); 0 elsewhere."""
        step = np.arange(self.counts.shape[1])
        return np.where(step >= (self.steps - self.steps // self._epochs)[:, None], self.counts, 0)
