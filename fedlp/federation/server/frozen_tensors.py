"""Encoded downlink; frozen tensors are sent to a client once, and later instructions name their digest.

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
from fedlp.federation.wire.downloads import Download
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


class EncodedDownlink:
    """Encoding of values for clients; equal values always give equal bytes.

    Parameters
    ----------
    download : Download
        Encoding, and which tensors it is for; others are sent as they are.
    seed : int
        Seed of stochastic rounding, >= 0.
    """

    def __init__(self, submodels: SubModels, download: Download, seed: int) -> None:
        self._frozen, self._encoding = submodels.spec.frozen, download.encoding
        self._encodes_trained = download.covers_trained and not download.is_plain
        self._seed = torch_seed(seed, Stream.DOWNLOAD)
        self._digests: dict[bytes, bytes] = {}  # of decoded values, by the digest of those before

    def encodes(self, layout: SubModelLayout) -> bool:
        """Return whether a sub-model has tensors that change by their encoding."""
        return self._encodes_trained or self._encodes_frozen(layout)

    def _encodes_frozen(self, layout: SubModelLayout) -> bool:
        return not is_plain(self._encoding) and not self._frozen.isdisjoint(layout.name_set)

    def digest(self, layout: SubModelLayout, values: Mapping[str, Tensor]) -> bytes:
        """Return the digest of the decoded frozen tensors of a sub-model; empty if it has none."""
        still = self._still(values)
        if not still:
            return b""
        before = digest_tensors(still)
        if not self._encodes_frozen(layout):
            return before
        if before not in self._digests:
            self._digests = dict(list(self._digests.items())[-_KNOWN:])
            self._digests[before] = digest_tensors(self._decoded(layout, still))
        return self._digests[before]

    def encode(self, layout: SubModelLayout, values: Mapping[str, Tensor], held: bool = False) -> messages.Sent:
        """Return the encoded values of a sub-model, without frozen ones where the client holds them."""
        is_split = held or self._encodes_frozen(layout)
        others = {name: x for name, x in values.items() if name not in self._frozen} if is_split else values
        params = messages.encode_params(self._encode(others) if self._encodes_trained else others)
        if held or not is_split:
            return messages.Sent(params)
        frozen = messages.encode_params(self._encode(self._still(values)))
        return messages.Sent(params, frozen, self.digest(layout, values))

    def decoded(self, layout: SubModelLayout, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the values as a client holds them."""
        if not self.encodes(layout):
            return values
        return {**values, **self._decoded(layout, values if self._encodes_trained else self._still(values))}

    def _still(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in values.items() if name in self._frozen}

    def _encode(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._encoding.encode(values, torch.Generator().manual_seed(self._seed))

    def _decoded(self, layout: SubModelLayout, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        signature = layout.signature(frozenset(values))
        return self._encoding.decode(self._encode(values), signature, "the server's model")


_KNOWN = 255  # digests kept
