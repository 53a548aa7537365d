"""Frozen tensors of a client: received once, kept as they were encoded, checked by the digest of their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fedlp.errors import DataError, ProtocolError
from fedlp.federation.client.store import ClientStore
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.digests import digest_tensors
from fedlp.federation.wire.encoded_tensors import EncodedTensors
from fedlp.federation.wire.encodings import Encoding
from fedlp.federation.wire.messages import frozen_signature
from fedlp.types import SubModel, TrainInstruction


class FrozenTensors:
    """Frozen tensors of the clients of one process.

    Parameters
    ----------
    download : Encoding
        Encoding in which they are sent and kept.
    store : ClientStore or None
        Store on disk; None keeps none.
    stays_encoded : bool
        Whether they are held encoded in memory, too.
    """

    def __init__(
        self, submodels: SubModels, download: Encoding, store: ClientStore | None, stays_encoded: bool = False
    ) -> None:
        self._submodels, self._download, self._store = submodels, download, store
        self._stays_encoded = stays_encoded

    def complete(self, instruction: TrainInstruction) -> TrainInstruction:
        """Return the instruction with stored frozen tensors, encoded if they stay so; received ones are stored.

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
        values, digest = self._read(self.encoded(instruction.submodel, kept))
        if digest != instruction.held:
            raise DataError(f"client {client_id} has lost the frozen tensors that it was sent; it needs them again")
        if self._stays_encoded:
            return replace(instruction, frozen=kept, held=b"")
        return replace(instruction, params={**instruction.params, **values}, held=b"")

    def encoded(self, submodel: SubModel, tensors: Mapping[str, Tensor]) -> EncodedTensors:
        """Return the encoded frozen tensors of a sub-model."""
        return EncodedTensors(self._download, tensors, frozen_signature(self._submodels.layout(submodel)))

    def _read(self, kept: EncodedTensors) -> tuple[dict[str, Tensor], bytes]:
        """Return the values of kept tensors, none if they stay encoded, and their digest; b"" if they have none."""
        try:
            if not kept.is_whole:
                return {}, b""
            if self._stays_encoded:
                return {}, kept.digest()
            values = dict(kept.decode())
            return values, digest_tensors(values)
        except ProtocolError:  # what no digest can be of
            return {}, b""
