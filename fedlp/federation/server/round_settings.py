"""Settings of the rounds of one run: values that a composition root takes from a config."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedlp.federation.server.availability import Availability


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """Settings of the rounds of one run.

    Attributes
    ----------
    num_clients, clients_per_round : int
        Clients of the federation, and those sampled in a round, >= 1.
    seed : int
        Seed of every draw, >= 0.
    min_clients : int
        Fewest good updates for a round to change the model, >= 0.
    eval_every : int
        Rounds between evaluations, >= 1; the last round always is evaluated.
    eval_batch_size : int
        Test examples per batch, >= 1.
    local_epochs : int
        Passes of a client over its examples, for the count of its MACs.
    weighting : "examples", "equal" or "held"
        Weight of an update in the aggregate.
    measures_statistics : bool
        Whether batch norm statistics are measured on clients before each evaluation.
    sends_deltas : bool
        Whether updates are differences from the values sent down; integers never are.
    entropy_coding : bool
        Whether single bytes of uploads are Huffman coded.
    timeout_s : float
        Deadline of a round.
    evaluates_tiers : bool
        Whether the sub-model of each tier is evaluated after the last round.
    availability : Availability
        Availability of clients by round.
    dropout : float
        Probability that a client drops out after receiving its sub-model, in [0, 1).
    extra_clients : int
        Over-selection: clients asked beyond ``clients_per_round``; the first ``clients_per_round`` answers count.
    """

    num_clients: int
    clients_per_round: int
    seed: int = 0
    min_clients: int = 1
    eval_every: int = 1
    eval_batch_size: int = 500
    local_epochs: int = 1
    weighting: str = "examples"
    measures_statistics: bool = False
    sends_deltas: bool = False
    entropy_coding: bool = False
    timeout_s: float = 3600.0
    evaluates_tiers: bool = False
    availability: Availability = field(default_factory=Availability)
    dropout: float = 0.0
    extra_clients: int = 0
