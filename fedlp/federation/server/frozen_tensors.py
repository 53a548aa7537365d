"""Downlink of frozen tensors: sent to a client once, encoded; later instructions name their digest.

The server's state, hence every checkpoint, holds the digest of the frozen tensors that each client
has confirmed by a good update. As long as the client's sub-model has the same frozen tensors, its instructions leave
them out. A client that has lost them fails that round, which is counted as any failure, and gets them anew next time.

The digest is of the decoded values, which clients train against. The server's state keeps the values before encoding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlp.federation.submodels import SubModelLayout, SubModels
from fedlp.federation.wire import messages
from fedlp.federation.wire.digests import digest_tensors
from fedlp.federation.wire.encodings import Encoding
from fedlp.federation.wire.encodings.base import is_plain
from fedlp.rng import Stream, torch_seed

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


class FrozenDownlink:
    """Encoding of frozen tensors for clients; equal values always give equal bytes.

    Parameters
    ----------
    encoding : Encoding
        Encoding of frozen tensors; others are sent as they are.
    seed : int
        Seed of stochastic rounding, >= 0.
    """

    def __init__(self, submodels: SubModels, encoding: Encoding, seed: int) -> None:
        self._frozen, self._encoding = submodels.spec.frozen, encoding
        self._seed = torch_seed(seed, Stream.DOWNLOAD)
        self._digests: dict[bytes, bytes] = {}  # of decoded values, by the digest of those before

    def encodes(self, layout: SubModelLayout) -> bool:
        """Return whether a sub-model has frozen tensors that change by their encoding."""
        return not is_plain(self._encoding) and not self._frozen.isdisjoint(layout.name_set)

    def digest(self, layout: SubModelLayout, values: Mapping[str, Tensor]) -> bytes:
        """Return the digest of the decoded frozen tensors of a sub-model; empty if it has none."""
        still = self._still(values)
        if not still:
            return b""
        before = digest_tensors(still)
        if not self.encodes(layout):
            return before
        if before not in self._digests:
            self._digests = dict(list(self._digests.items())[-_KNOWN:])
            self._digests[before] = digest_tensors(self._decode(layout, self._encode(still)))
        return self._digests[before]

    def encode(self, layout: SubModelLayout, values: Mapping[str, Tensor], held: bool = False) -> messages.Sent:
        """Return the encoded values of a sub-model, without frozen ones where the client holds them."""
        others = {name: tensor for name, tensor in values.items() if name not in self._frozen}
        if held:
            return messages.Sent(messages.encode_params(others))
        if not self.encodes(layout):
            return messages.Sent(messages.encode_params(values))
        frozen = messages.encode_params(self._encode(self._still(values)))
        return messages.Sent(messages.encode_params(others), frozen, self.digest(layout, values))

    def decoded(self, layout: SubModelLayout, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the values as a client holds them."""
        if not self.encodes(layout):
            return values
        return {**values, **self._decode(layout, self._encode(self._still(values)))}

    def _still(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in values.items() if name in self._frozen}

    def _encode(self, still: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._encoding.encode(still, torch.Generator().manual_seed(self._seed))

    def _decode(self, layout: SubModelLayout, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        signature = layout.signature(layout.name_set & self._frozen)
        return self._encoding.decode(encoded, signature, "the server's model")


_KNOWN = 255  # digests kept
