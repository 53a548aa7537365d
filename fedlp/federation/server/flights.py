"""Clients in flight, as tensors of the server's state, hence of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlp.errors import CheckpointError
from fedlp.federation.server.checkpoint import ServerState

Started = Mapping[int, tuple[int, float]]
"""Round of the model that each client was sent, and the second at which it was, by client."""

_PARAMS, _MEMORY = "params", "memory"


def pack_flights(
    now: float, started: Started, versions: Mapping[int, ServerState], current: ServerState
) -> dict[str, Tensor]:
    """Return virtual time, clients in flight, and the models and memories that they were sent.

    Tensors that equal those of the current state are left out.
    """
    rows = sorted((client_id, sent, since) for client_id, (sent, since) in started.items())
    found = {
        "now": torch.tensor(now, dtype=torch.float64),
        "flights": torch.tensor([row[:2] for row in rows], dtype=torch.int64).reshape(-1, 2),
        "started": torch.tensor([row[2] for row in rows], dtype=torch.float64),
    }
    for number, version in versions.items():
        for kind, tensors, kept in (
            (_PARAMS, version.params, current.params),
            (_MEMORY, version.memory, current.memory),
        ):
            found[f"{number}.{kind}"] = _names(tensors)
            for name, tensor in tensors.items():
                if name not in kept or not _equal(tensor, kept[name]):
                    found[f"{number}.{kind}.{name}"] = tensor.clone()
    return found


def unpack_flights(state: ServerState) -> tuple[Started, dict[int, ServerState]]:
    """Return the clients in flight, and the states that they were sent, by round, rising.

    Raises
    ------
    CheckpointError
        If a tensor is missing.
    """
    clock = state.clock
    try:
        rows = zip(clock["flights"].tolist(), clock["started"].tolist(), strict=True)
        started = {client_id: (sent, since) for (client_id, sent), since in rows}
        versions = {
            number: ServerState(
                number - 1,
                _unpack(clock, f"{number}.{_PARAMS}", state.params),
                memory=_unpack(clock, f"{number}.{_MEMORY}", state.memory),
            )
            for number in sorted({sent for sent, _ in started.values()})
        }
    except (KeyError, ValueError, TypeError, UnicodeDecodeError) as error:
        text = f"the checkpoint of round {state.server_round} lacks what clients in flight were sent ({error})"
        raise CheckpointError(f"{text}; restore the file") from error
    return started, versions


def _unpack(clock: Mapping[str, Tensor], key: str, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = bytes(clock[key].tolist()).decode().split("\n") if clock[key].numel() else []
    return {name: clock[f"{key}.{name}"] if f"{key}.{name}" in clock else kept[name] for name in names}


def _names(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return names, in order, as bytes."""
    return torch.tensor(list("\n".join(tensors).encode()), dtype=torch.uint8)


def _equal(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, where neither holds NaN."""
    return left is right or (left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right))
