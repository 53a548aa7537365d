"""Warnings before the first round of what no client trains."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress

from fedlp.errors import AllocationError
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.strategies.policy import Policy
from fedlp.federation.submodels import SubModelLayout, SubModels

log = logging.getLogger("fedlp")


def warn_of_starved_layers(
    policy: Policy, submodels: SubModels, state: ServerState, client_ids: Iterable[int], evaluates_largest: bool
) -> None:
    """Warn of layers that no client will ever return, such as the head if no client has full depth.

    Parameters
    ----------
    evaluates_largest : bool
        Whether the largest sub-model is evaluated if no client holds the whole model, which the warning says.
    """
    layouts = set()
    for client_id in client_ids:
        with suppress(AllocationError):  # said in every round in which the client would take part
            layout = submodels.layout(policy.assign(1, client_id, state.memory, state.params).submodel)
            if layout.is_whole:
                return  # which trains every layer
            layouts.add(layout)
    _warn_of_narrow_clients(layouts, submodels, evaluates_largest)
    returned = {name for layout in layouts for name in layout.names}
    starved = [layer.name for layer in submodels.spec.layers if returned.isdisjoint(layer.tensors)]
    if starved:
        names = ", ".join(starved if len(starved) < 4 else [*starved[:2], "...", starved[-1]])
        log.warning("no client trains %s (%d layers): their values stay as they are", names, len(starved))


def _warn_of_narrow_clients(layouts: set[SubModelLayout], submodels: SubModels, evaluates_largest: bool) -> None:
    """Warn that no client holds the whole model."""
    if layouts and not any(layout.is_whole for layout in layouts):
        most = max(layout.num_params() for layout in layouts) / submodels.spec.num_params
        measured = ", and is what is evaluated" if evaluates_largest else "; the whole one is evaluated all the same"
        log.warning("no client holds the whole model: the largest sub-model has %.0f %% of it%s", 100 * most, measured)
