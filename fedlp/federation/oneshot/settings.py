"""Settings of federated one-shot pruning: values that a composition root takes from a config."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from fedlp.errors import DataError
from fedlp.federation.secagg.settings import SecAggSettings
from fedlp.pruning.reader_layers import Method


class Share(IntEnum):
    """Share of a client's calibration examples."""

    STATISTICS = 0  # all questions but judgements read it alone
    PART = 1  # a quarter of the batches of FITNESS
    FITNESS = 2
    HELD_OUT = 3


@dataclass(frozen=True)
class OneShotSettings:
    """Settings of one federated one-shot pruning, or of a search that judges plans on clients.

    Attributes
    ----------
    method : Method
        Score of units, and recovery of the weights that stay.
    seed : int
        Seed of every draw, >= 0.
    device : str
        Device of the clients.
    clients_per_round, min_clients : int
        Clients asked, and the fewest good answers.
    timeout_s : float
        Deadline of an answer.
    examples, batch_size : int
        Calibration examples of each client, and of a batch, >= 1.
    votes : bool
        Whether each client prunes alone and votes; else the server prunes on pooled moments.
    shared : bool
        Whether channels that several layers read are pruned too.
    wide_sums : bool
        Whether sums are sent as float64; else as float32.
    secagg : SecAggSettings, optional
        Settings of secure aggregation, by which the server learns sums over groups of clients alone.
    fitness_examples, held_out_examples : int
        Further examples of each client on which plans are judged; 0 without a search.
    """

    method: Method
    seed: int = 0
    device: str = "cpu"
    clients_per_round: int = 1
    min_clients: int = 1
    timeout_s: float = 3600.0
    examples: int = 256
    batch_size: int = 32
    votes: bool = False
    shared: bool = True
    wide_sums: bool = False
    secagg: SecAggSettings | None = None
    fitness_examples: int = 0
    held_out_examples: int = 0

    def most_examples(self, share: int) -> int:
        """Return the most examples of a client in a share."""
        if share == Share.STATISTICS:
            return self.examples
        return self.held_out_examples if share == Share.HELD_OUT else self.fitness_examples

    def divide(self, num_examples: int) -> tuple[int, int, int]:
        """Return how many of a client's examples are for statistics, fitness and the held-out check.

        A client with fewer than are asked for divides them in proportion, at least one each.

        Raises
        ------
        DataError
            If it has too few for that.
        """
        wanted = self.examples, self.fitness_examples, self.held_out_examples
        total = sum(wanted)
        if num_examples >= total:
            return wanted
        if not self.fitness_examples:
            return num_examples, 0, 0
        if num_examples < len(wanted):
            raise DataError(f"a search needs {len(wanted)} whole examples of a client; this one has {num_examples}")
        fitness = min(max(1, num_examples * wanted[1] // total), num_examples - 2)
        held_out = min(max(1, num_examples * wanted[2] // total), num_examples - fitness - 1)
        return num_examples - fitness - held_out, fitness, held_out

    @property
    def dtype(self) -> torch.dtype:
        """Type of encoded sums."""
        return torch.float64 if self.wide_sums else torch.float32
