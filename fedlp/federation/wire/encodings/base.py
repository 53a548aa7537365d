"""Protocol of encodings, and what all share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedlp.federation.wire.packing import Signature


@runtime_checkable
class Encoding(Protocol):
    """Protocol of the kind ``encoding``: values to what travels and back.

    An encoding describes the size of what travels from shapes alone, and checks what it reads.
    """

    def encode(self, params: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the tensors that travel for some values; ``generator``, on the CPU, draws what is random."""

    def signature(self, signature: Signature) -> Signature:
        """Return names, shapes and dtypes of what travels for tensors of ``signature``."""

    def decode(self, encoded: Mapping[str, Tensor], signature: Signature, who: str) -> dict[str, Tensor]:
        """Return the values, in the dtypes of ``signature``, finite where what travels as it is is finite.

        Raises
        ------
        ProtocolError
            Where what came cannot have been encoded from finite values; names ``who`` and the tensor.
        """


def is_matrix(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Return whether a tensor is encoded: a float of two dimensions or more. Vectors are few, and matter much."""
    return dtype in (torch.float32, torch.float64) and len(shape) >= 2


def is_plain(encoding: Encoding) -> bool:
    """Return whether values travel as they are."""
    return bool(getattr(encoding, "is_plain", False))


def encoded_bytes(shape: Sequence[int], dtype: torch.dtype, encoding: Encoding) -> tuple[float, float]:
    """Return the bytes of each entry of a tensor, and of each row beside its entries.

    Encodings that say nothing of rows (``row_bytes``) count all bytes per entry.
    """
    travels = encoding.signature((("x", tuple(shape), dtype),))
    total = sum(math.prod(size) * kind.itemsize for _, size, kind in travels)
    entries = max(math.prod(shape), 1)
    per_row = float(getattr(encoding, "row_bytes", 0.0)) if is_matrix(shape, dtype) else 0.0
    bits = getattr(encoding, "bits", None) if is_matrix(shape, dtype) else None
    if bits is not None:
        return bits / 8, per_row
    return total / entries, per_row
