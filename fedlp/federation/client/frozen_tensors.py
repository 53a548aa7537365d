"""Frozen tensors of a client: received once, kept as they were encoded, checked by the digest of their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fedlp.errors import DataError, ProtocolError
from fedlp.federation.client.store import ClientStore
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.digests import digest_tensors
from fedlp.federation.wire.encodings import Encoding
from fedlp.types import SubModel, TrainInstruction


class FrozenTensors:
    """Frozen tensors of the clients of one process.

    Parameters
    ----------
    download : Encoding
        Encoding in which they are sent and kept.
    store : ClientStore or None
        Store on disk; None keeps none.
    """

    def __init__(self, submodels: SubModels, download: Encoding, store: ClientStore | None) -> None:
        self._submodels, self._download, self._store = submodels, download, store

    def complete(self, instruction: TrainInstruction) -> TrainInstruction:
        """Return the instruction with stored frozen tensors; received ones are stored.

        Raises
        ------
        DataError
            If the stored tensors of the instruction's digest are missing.
        """
        client_id, server_round = instruction.client_id, instruction.server_round
        if not instruction.held:
            still = self._submodels.spec.frozen
            received = instruction.frozen or {name: x for name, x in instruction.params.items() if name in still}
            if received and self._store is not None:
                self._store.save(client_id, server_round, received)
            return instruction
        kept = {} if self._store is None else self._store.load(client_id, before_round=server_round)
        found = self._decode(instruction.submodel, kept)
        if digest_tensors(found) != instruction.held:
            raise DataError(f"client {client_id} has lost the frozen tensors that it was sent; it needs them again")
        return replace(instruction, params={**instruction.params, **found}, held=b"")

    def _decode(self, submodel: SubModel, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values of kept tensors; empty if they are not those of the sub-model."""
        layout = self._submodels.layout(submodel)
        signature = layout.signature(layout.name_set & self._submodels.spec.frozen)
        wanted = {name: (shape, dtype) for name, shape, dtype in self._download.signature(signature)}
        if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in kept.items()} != wanted:
            return {}
        try:
            return self._download.decode(kept, signature, "the client's store")
        except ProtocolError:  # what no digest can be of
            return {}
