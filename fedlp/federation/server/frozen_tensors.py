"""Downlink of frozen tensors: sent to a client once, later instructions name their digest.

The server's state, hence every checkpoint, holds the digest of the frozen tensors that each client
has confirmed by a good update. As long as the client's sub-model has the same frozen tensors, its instructions leave
them out. A client that has lost them fails that round, which is counted as any failure, and gets them anew next time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_PREFIX = "frozen"


def holds(memory: Mapping[str, Tensor], client_id: int, digest: bytes) -> bool:
    """Return whether a client has confirmed that it holds the frozen tensors of a digest."""
    found = memory.get(f"{_PREFIX}.{client_id}")
    return found is not None and bytes(found.tolist()) == digest


def note_holders(
    memory: Mapping[str, Tensor], received: Mapping[int, bytes], failed: frozenset[int]
) -> Mapping[str, Tensor]:
    """Return the memory after a round; unchanged where no client was sent frozen tensors.

    Parameters
    ----------
    received : mapping from client id to bytes
        Digest of the frozen tensors of each client's sub-model in the round.
    failed : frozenset of int
        Clients without an update; their stored tensors are unknown.
    """
    if not received:
        return memory
    found = {name: tensor for name, tensor in memory.items() if name not in {f"{_PREFIX}.{i}" for i in failed}}
    for client_id, digest in received.items():
        if client_id not in failed:
            found[f"{_PREFIX}.{client_id}"] = torch.tensor(list(digest), dtype=torch.uint8)
    return found
