"""State of the current round, and its line of ``rounds.jsonl``."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedlp.federation.aggregation.aggregator import Accumulator
from fedlp.federation.server.state_check import RoundGuard
from fedlp.federation.strategies.policy import Answer
from fedlp.models.spec import ModelSpec
from fedlp.types import Assignment, ClientCost, ClientEvaluation, ClientFailure, RoundRecord, RoundTime


@dataclass
class RoundUnderWay:
    """Current round, filled in with messages and replies.

    Attributes
    ----------
    frozen : dict from client id to bytes
        Digest of the frozen tensors of each client's sub-model; empty without frozen tensors.
    assigned : deque of (Assignment, int)
        Unanswered instructions, in the order of sending, with their bytes.
    """

    server_round: int
    cohort: tuple[int, ...]
    frozen: dict[int, bytes] = field(default_factory=dict)
    assigned: deque[tuple[Assignment, int]] = field(default_factory=deque)
    costs: list[ClientCost] = field(default_factory=list)
    failures: list[ClientFailure] = field(default_factory=list)
    coverage: Mapping[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tested: dict[str, float] = field(default_factory=dict)
    evaluations: list[ClientEvaluation] = field(default_factory=list)
    absent: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    privacy: dict[str, float] = field(default_factory=dict)
    clipped: dict[int, float] = field(default_factory=dict)
    staleness: dict[int, int] = field(default_factory=dict)
    simulated: RoundTime | None = None

    def take_over(self, spent: RoundRecord) -> None:
        """Count costs, failures and bytes of phases of what came before the round."""
        self.costs.extend(spent.clients)
        self.failures.extend(spent.failures)
        for phase, counts in spent.phases.items():
            total = self.phases.setdefault(phase, dict.fromkeys(counts, 0))
            for way, count in counts.items():
                total[way] += count

    def finish(self, wall_time_s: float) -> RoundRecord:
        """Return the record of the finished round; totals are sums over clients."""
        costs = self.costs
        return RoundRecord(
            server_round=self.server_round,
            cohort=self.cohort,
            bytes_up=sum(cost.bytes_up for cost in costs),
            bytes_down=sum(cost.bytes_down for cost in costs),
            params_up=sum(cost.params_up for cost in costs),
            params_down=sum(cost.params_down for cost in costs),
            macs=sum(cost.macs for cost in costs),
            coverage=self.coverage,
            failures=tuple(self.failures),
            clients=tuple(costs),
            metrics={**self.tested, **self.metrics},  # the task's first metric stands first
            wall_time_s=wall_time_s,
            evaluations=tuple(self.evaluations),
            absent=self.absent,
            phases=self.phases,
            privacy=self.privacy,
            clipped=self.clipped,
            staleness=self.staleness,
            simulated=self.simulated,
        )


@dataclass
class Tally:
    """Updates of a round as they come in.

    Attributes
    ----------
    losses : list of (float, int)
        Training loss and number of examples of each client.
    arrived : list of int
        Clients in the order in which their updates were counted in.
    """

    average: Accumulator
    guard: RoundGuard
    answers: list[Answer] = field(default_factory=list)
    losses: list[tuple[float, int]] = field(default_factory=list)
    arrived: list[int] = field(default_factory=list)

    def mean_loss(self) -> float:
        """Return the mean training loss, weighted by numbers of examples."""
        total = sum(count for _, count in self.losses)
        return sum(loss * count for loss, count in self.losses) / total

    def release(self) -> None:
        """Free the memory of the updates, whose average has been taken."""
        del self.average

    def scaled_down(self) -> dict[int, float]:
        """Return the clients whose updates the aggregator scaled down, sorted, with the factors, < 1."""
        scales: Sequence[float] = getattr(self.average, "scales", ())
        pairs = sorted(zip(self.arrived, scales, strict=False))
        return {client_id: scale for client_id, scale in pairs if scale < 1.0}


def layer_coverage(coverage: Mapping[str, float], spec: ModelSpec) -> dict[str, float]:
    """Return the coverage of each layer from its tensors'."""
    sizes = {name: math.prod(info.shape) for name, info in spec.tensors.items()}
    return {
        layer.name: sum(coverage[name] * sizes[name] for name in layer.tensors)
        / sum(sizes[name] for name in layer.tensors)
        for layer in spec.layers
    }
