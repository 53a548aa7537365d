"""Step of the server: the aggregate of a round's updates becomes the new model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlp.federation.aggregation.aggregator import Accumulator, Aggregator
from fedlp.federation.aggregation.noised_sum import Holders
from fedlp.federation.aggregation.server_optimizer import ServerOptimizer, apply_server_optimizer
from fedlp.federation.server.central_privacy import CentralPrivacy
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.round_record import layer_coverage
from fedlp.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ServerStep:
    """Step of the server from one state to the next.

    Attributes
    ----------
    sends_weights : bool
        Whether updates hold weights; else differences from the sent values, except integers.
    private : CentralPrivacy, optional
        Clipping and noise in place of the aggregator.
    """

    spec: ModelSpec
    aggregator: Aggregator
    optimizer: ServerOptimizer
    sends_weights: bool
    private: CentralPrivacy | None = None

    @property
    def trainable(self) -> frozenset[str]:
        """Names of the trained tensors."""
        return frozenset(name for name, info in self.spec.tensors.items() if info.trainable)

    def before(self, state: ServerState) -> Mapping[str, Tensor]:
        """Return the values that updates are averaged over: the model's, or zeros where they are differences."""
        return state.params if self.sends_weights else _without_floats(state.params)

    def begin(self, server_round: int, state: ServerState, holders: Callable[[], Holders]) -> Accumulator:
        """Return the round's accumulator.

        Parameters
        ----------
        holders : callable
            Returns the expected number of clients that return each entry; called with central privacy alone.
        """
        params = self.before(state)
        if self.private is not None:
            return self.private.begin(server_round, params, holders(), state.memory)
        if (begin := getattr(self.aggregator, "begin_round", None)) is not None:
            bounded: Accumulator = begin(params, self.trainable)
            return bounded
        return self.aggregator.begin(params)

    def apply(self, state: ServerState, average: Accumulator) -> tuple[ServerState, dict[str, float]]:
        """Return the state with the new model, and the coverage of each layer."""
        params, coverage = average.result()
        if not self.sends_weights:
            for name, values in params.items():
                if values.is_floating_point():
                    values += state.params[name]
        params, optimizer = apply_server_optimizer(
            self.optimizer, state.params, params, state.optimizer, average.covered, self.trainable
        )
        return replace(state, params=params, optimizer=optimizer), layer_coverage(coverage, self.spec)


def _without_floats(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros in place of the weights, for sums of differences."""
    return {name: torch.zeros_like(values) if values.is_floating_point() else values for name, values in params.items()}
