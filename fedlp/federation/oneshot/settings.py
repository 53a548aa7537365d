"""Settings of federated one-shot pruning: values that a composition root takes from a config."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedlp.federation.secagg.settings import SecAggSettings
from fedlp.pruning.reader_layers import Method


@dataclass(frozen=True)
class OneShotSettings:
    """Settings of one federated one-shot pruning.

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

    @property
    def dtype(self) -> torch.dtype:
        """Type of encoded sums."""
        return torch.float64 if self.wide_sums else torch.float32
