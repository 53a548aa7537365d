"""Checks of updates against the model they came from, and of a new server state before it is accepted.

A decoded update may still be impossible for training: a negative variance, or an entry that is
10,000 times the largest of its tensor. Such an update is rejected. If the state that a round gives is broken all the
same, the round is undone: the model, the server optimizer's state and the policy's memory stay as they were.

Suspects of an undone round are found without a second aggregation, from one number per update and tensor that is noted
as updates come: a suspect's largest entry in the broken tensor is more than 100 times the (lower) median over the
updates that hold the tensor, or it is the only one. Without an outlier, no suspect is named. Suspects are part of the
state, so also of checkpoints: their later updates are rejected.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.errors import ProtocolError
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.wire.ranges import LARGEST_VALUE, MOST_STEPS, Bounds, Flags
from fedlp.pruning.tracing.widths import slice_tensor
from fedlp.types import ClientUpdate, Keep

log = logging.getLogger("fedlp")

_LARGEST_GROWTH = 1e4  # of trained entries in one round, times the largest of the tensor before it, or 1
_LARGEST_BUFFER_GROWTH = 1e8  # of others, such as running variances, which start at 1 whatever the inputs are
_STANDS_OUT = 100.0  # times the median of the round
_VARIANCE, _BATCHES = "running_var", "num_batches_tracked"


@dataclass(frozen=True, slots=True)
class Fault:
    """A broken tensor of a state.

    Attributes
    ----------
    tensor : str
        Its name in the model.
    text : str
        Tensor, or its slot in the server optimizer's state, and the fault.
    """

    tensor: str
    text: str


class RoundGuard:
    """Check of one round's updates, and of the resulting state.

    Parameters
    ----------
    state : ServerState
        The state before the round.
    trainable : collection of str
        Names of the trained tensors.
    holds_weights : bool
        Whether updates hold weights; else differences, but for integers.
    """

    def __init__(self, state: ServerState, trainable: frozenset[str], holds_weights: bool) -> None:
        self._state, self._trainable, self._holds_weights = state, trainable, holds_weights
        self._names = {name: number for number, name in enumerate(state.params)}
        self._largest = {name: _largest(tensor) for name, tensor in state.params.items()}
        self._extents: dict[int, NDArray[np.float64]] = {}  # of each client, by tensor; NaN where it returned none

    def admit(
        self,
        update: ClientUpdate,
        keeps: Mapping[str, tuple[Keep, ...]],
        sent: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Check an update against the state before the round, and record the extent of each of its tensors.

        Parameters
        ----------
        sent : mapping from tensor name to Tensor, optional
            Values from which a stale update's differences are; those of the state if absent.

        Raises
        ------
        ProtocolError
            If an entry is out of proportion, a variance would be negative, or the client is a suspect; names both.
        """
        who = f"client {update.client_id}, round {update.server_round}"
        if update.client_id in self._state.suspects:
            raise ProtocolError(
                f"{who}: its updates are not used any more, since one broke the model in a round before"
            )
        extents = np.full(len(self._names), math.nan)
        for name, tensor in update.params.items():
            extents[self._names[name]] = found = _largest(tensor)
            growth = _LARGEST_GROWTH if name in self._trainable else _LARGEST_BUFFER_GROWTH
            most = growth * max(1.0, self._largest[name])
            if tensor.is_floating_point() and found > most:
                raise ProtocolError(
                    f"{who}: tensor {name} holds {found:.3g}; more than {most:.3g} is out of proportion"
                )
            if is_variance(name):
                self._check_variance(name, tensor, keeps.get(name), who, sent)
        self._extents[update.client_id] = extents

    def admit_stack(
        self, client_ids: Sequence[int], bounds: Mapping[str, Bounds], floats: frozenset[str], known: Flags
    ) -> Flags:
        """Check updates of several clients by the bounds of their tensors; record the extents of the updates that pass.

        Parameters
        ----------
        bounds : mapping from tensor name to Bounds
        floats : frozenset of str
            Names of the floating-point tensors.
        known : (clients,)
            Whether the client has passed all checks before.

        Returns
        -------
        (clients,)
            Whether :meth:`admit` takes the update; where not, it says why. Of weights, not differences.
        """
        suspects = np.array([client_id in self._state.suspects for client_id in client_ids])
        extents = np.full((len(client_ids), len(self._names)), math.nan)
        sound: Flags = known & ~suspects
        for name, (low, high) in bounds.items():
            extents[:, self._names[name]] = found = np.maximum(-low, high)
            growth = _LARGEST_GROWTH if name in self._trainable else _LARGEST_BUFFER_GROWTH
            if name in floats:
                sound &= found <= growth * max(1.0, self._largest[name])
            if is_variance(name):
                sound &= low >= 0
        self._extents |= {client_ids[k]: extents[k] for k in np.flatnonzero(sound).tolist()}
        return sound

    def _check_variance(
        self,
        name: str,
        tensor: Tensor,
        keeps: tuple[Keep, ...] | None,
        who: str,
        sent: Mapping[str, Tensor] | None,
    ) -> None:
        variance = tensor
        if not self._holds_weights and sent is not None:
            variance = (sent[name] + tensor).to(tensor.dtype)
        elif not self._holds_weights:
            before = self._state.params[name]
            variance = (before if keeps is None else slice_tensor(before, keeps)) + tensor
        if bool((variance < 0).any()):
            raise ProtocolError(f"{who}: tensor {name} holds negative variances")

    def accept(self, new: ServerState, accuse: Callable[[int, str, ProtocolError], None] | None) -> ServerState:
        """Return the state after the round: ``new`` if sound, else the one before with the new round number.

        Parameters
        ----------
        accuse : callable
            Called with each suspect: client id, reason and error; nobody is suspected if None.
        """
        fault = find_fault(new)
        if fault is None:
            return new
        suspects = self._suspects(fault) if accuse is not None else []
        advice = "" if suspects else "; no update stands out: lower server_optimizer.lr or local.lr"
        log.warning("round %d is undone: %s%s", new.server_round, fault.text, advice)
        for client_id in suspects:
            assert accuse is not None
            text = f"client {client_id}, round {new.server_round}: with its update, {fault.text}; the round is undone"
            accuse(client_id, "suspected", ProtocolError(text))
        known = tuple(sorted({*self._state.suspects, *suspects}))
        return replace(self._state, server_round=new.server_round, suspects=known)

    def _suspects(self, fault: Fault) -> list[int]:
        """Return the clients whose update of the broken tensor stands out, sorted."""
        if fault.tensor not in self._names:
            return []
        column = self._names[fault.tensor]
        found = {client_id: float(row[column]) for client_id, row in self._extents.items()}
        found = {client_id: extent for client_id, extent in found.items() if not math.isnan(extent)}
        if len(found) < 2:
            return list(found)
        median = sorted(found.values())[(len(found) - 1) // 2]
        return sorted(client_id for client_id, extent in found.items() if extent > _STANDS_OUT * median)


def is_variance(name: str) -> bool:
    """Return whether a tensor of the model is a running variance, hence never negative."""
    return name.endswith(_VARIANCE)


def find_fault(state: ServerState) -> Fault | None:
    """Return the first tensor that is not finite or out of range, or a negative variance; None if all are sound.

    A policy's memory is its own: it may hold infinities on purpose, and is made of numbers that were checked.
    """
    parts = (
        ("", state.params, LARGEST_VALUE),  # what no update may hold, no client could train on
        ("the server optimizer's ", state.optimizer, math.inf),
    )
    for whose, tensors, largest in parts:
        for name, tensor in tensors.items():
            if text := _fault_of(name, tensor, largest):
                of = name.partition(".")[2] if tensors is state.optimizer else name  # slot.NAME
                return Fault(of, f"{whose}{name} {text}")
    return None


def _fault_of(name: str, tensor: Tensor, largest: float) -> str:
    """Return the fault of a tensor; empty if sound."""
    if tensor.dtype == torch.bool or not tensor.numel():
        return ""
    low, high = (bound.item() for bound in torch.aminmax(tensor.detach()))
    if not tensor.is_floating_point():
        least = 0 if name.endswith(_BATCHES) else -MOST_STEPS
        return "" if least <= low <= high <= MOST_STEPS else f"would hold a count outside [{least}, {MOST_STEPS}]"
    if not -math.inf < low <= high < math.inf:
        return "would hold NaN or infinite values"
    if not -largest <= low <= high <= largest:
        return f"would hold values beyond ±{largest:g}"
    squares = is_variance(name) or name.startswith("variance.")
    return "would hold negative variances" if squares and low < 0 else ""


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value of a tensor; 0 if empty."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return max(-float(low), float(high))
