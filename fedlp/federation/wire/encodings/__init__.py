"""Encodings of uploads: parts of kind ``encoding``, one file each."""

from fedlp.federation.wire.encodings.base import Encoding, encoded_bytes

__all__ = ["Encoding", "encoded_bytes"]
