"""Updates of earlier models in buffered aggregation: discounted by their staleness, as updates of the current one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.state_check import is_variance
from fedlp.federation.strategies.policy import Policy, offset_of
from fedlp.federation.submodels import SubModels
from fedlp.pruning.tracing.widths import slice_tensor
from fedlp.types import Assignment, ClientUpdate, SubModel

Arrived = dict[int, tuple[Assignment, ClientUpdate]]
"""Updates in the buffer, by client."""


@dataclass(frozen=True, slots=True)
class StaleUpdates:
    """Discount of stale updates.

    Attributes
    ----------
    exponent : float
        a >= 0 of the factor (1 + staleness) ** -a.
    sends_weights : bool
        Whether updates hold weights; else differences from the sent values, except integers.
    """

    submodels: SubModels
    exponent: float
    sends_weights: bool

    def discounted(
        self,
        staleness: int,
        instruction: Assignment,
        update: ClientUpdate,
        now: ServerState,
        then: ServerState,
        policy: Policy,
    ) -> Mapping[str, Tensor]:
        """Return an update as one of the current model; integers as they are.

        With weights, it is the current values plus the discounted difference from those that the client received. A
        running variance falls no lower than the smaller of the client's and the current one, so never below 0.

        Parameters
        ----------
        staleness : int
            Steps of the server between download and arrival, >= 1.
        now, then : ServerState
            Current state, and the one that the client was sent.
        """
        factor = (1.0 + staleness) ** -self.exponent
        floats = {name: values.double() for name, values in update.params.items() if values.is_floating_point()}
        current: Mapping[str, Tensor] = {}
        before: Mapping[str, Tensor] = {}
        if self.sends_weights or any(map(is_variance, floats)):
            layout = self.submodels.layout(SubModel(instruction.submodel.depth, update.widths))
            current, before = layout.slice(now.params), self.sent(instruction, update, then, policy)
        found: dict[str, Tensor] = {}
        for name, values in floats.items():
            found[name] = factor * (values - before[name] if self.sends_weights else values)
            if is_variance(name):
                own = values if self.sends_weights else before[name] + values
                found[name] = torch.maximum(found[name], (own - current[name].double()).clamp(max=0.0))
            if self.sends_weights:
                found[name] += current[name].double()
        return {**update.params, **{name: values.to(update.params[name].dtype) for name, values in found.items()}}

    def sent(
        self, instruction: Assignment, update: ClientUpdate, version: ServerState, policy: Policy
    ) -> dict[str, Tensor]:
        """Return the values that a client received of the units that it returns; float64."""
        held = self.submodels.layout(instruction.submodel)
        layout = self.submodels.layout(SubModel(instruction.submodel.depth, update.widths))
        found = {name: values.double() for name, values in layout.slice(version.params).items()}
        for name, offset in offset_of(policy, instruction.client_id, version.memory).values.items():
            if name in found and not held.is_whole:
                part = offset
                if name in layout.keeps:
                    keeps = layout.keeps[name]
                    outer = held.keeps.get(name)
                    within = keeps if outer is None else [k.within(o) for k, o in zip(keeps, outer, strict=True)]
                    part = slice_tensor(offset, tuple(within))
                found[name] = found[name] + part
        return found
