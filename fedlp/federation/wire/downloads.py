"""Encoding of downloads: frozen tensors, which a client receives once, and the others of every round if asked."""

from __future__ import annotations

from dataclasses import dataclass, field

from flwr.app import RecordDict
from torch import Tensor

from fedlp.federation.wire.encoded_tensors import EncodedTensors
from fedlp.federation.wire.encodings import Encoding
from fedlp.federation.wire.encodings.base import is_plain
from fedlp.federation.wire.encodings.float32 import Float32
from fedlp.federation.wire.packing import Signature
from fedlp.federation.wire.ranges import check_values
from fedlp.federation.wire.record_access import read_tensors

SERVER = "the server's message"


@dataclass(frozen=True)
class Download:
    """Encoding of downloads.

    Attributes
    ----------
    encoding : Encoding
    covers_trained : bool
        Whether trained tensors are encoded too; they are as they are if False.
    """

    encoding: Encoding = field(default_factory=Float32)
    covers_trained: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether all tensors are sent as they are."""
        return is_plain(self.encoding)

    def read(self, content: RecordDict, key: str, signature: Signature) -> EncodedTensors:
        """Return the tensors of ``signature`` as a record has them; their values are not checked yet.

        Raises
        ------
        KeyError, ValueError
            If the record is missing or malformed.
        ProtocolError
            If an encoded number is not finite or out of range.
        """
        encoded = read_tensors(content, key, self.encoding.signature(signature))
        check_values(encoded, SERVER)
        return EncodedTensors(self.encoding, encoded, signature)

    def read_trained(self, content: RecordDict, key: str, signature: Signature) -> dict[str, Tensor]:
        """Return the tensors of a record that are not sent once, decoded; errors as of :meth:`read`."""
        if not self.covers_trained:
            return read_tensors(content, key, signature)
        found = dict(self.read(content, key, signature).decode())
        check_values(found, SERVER)
        return found
