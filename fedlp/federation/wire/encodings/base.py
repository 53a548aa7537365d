"""Protocol of encodings, and shared helpers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedlp.federation.wire.packing import Signature


@runtime_checkable
class Encoding(Protocol):
    """Protocol of the kind ``encoding``: values to encoded tensors and back.

    An encoding gives the size of encoded tensors from shapes alone, and validates its input.
    """

    def encode(self, params: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the encoded tensors; ``generator``, on the CPU, supplies random numbers."""

    def signature(self, signature: Signature) -> Signature:
        """Return names, shapes and dtypes of the encoded tensors for ``signature``."""

    def decode(self, encoded: Mapping[str, Tensor], signature: Signature, who: str) -> dict[str, Tensor]:
        """Return the decoded values, in the dtypes of ``signature``; finite if unencoded tensors are.

        Raises
        ------
        ProtocolError
            If the input is no encoding of finite values; names ``who`` and the tensor.
        """


@runtime_checkable
class RowEncoding(Encoding, Protocol):
    """Encoding that also decodes rows of a matrix alone."""

    def has_rows(self, columns: int) -> bool:
        """Return whether rows of that many columns can be decoded alone."""

    def decode_rows(self, encoded: Mapping[str, Tensor], name: str, columns: int, rows: slice | Tensor) -> Tensor:
        """Return chosen rows of a matrix, (rows, columns) float32, those of :meth:`decode` bit for bit; unchecked.

        Parameters
        ----------
        rows : slice or (rows,) int64
            Positions of the rows.
        """

    def check_scales(self, encoded: Mapping[str, Tensor], name: str, who: str) -> None:
        """Raise ProtocolError for a scale of a matrix that :meth:`decode` refuses."""


def is_matrix(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Return whether a tensor is encoded: a float of two dimensions or more. Vectors are small and sensitive."""
    return dtype in (torch.float32, torch.float64) and len(shape) >= 2


def is_plain(encoding: Encoding) -> bool:
    """Return whether values are sent unencoded."""
    return bool(getattr(encoding, "is_plain", False))


def encoded_bytes(shape: Sequence[int], dtype: torch.dtype, encoding: Encoding) -> tuple[float, float]:
    """Return the bytes of each entry of a tensor, and of each row beside its entries.

    Encodings without ``row_bytes`` count all bytes per entry.
    """
    travels = encoding.signature((("x", tuple(shape), dtype),))
    total = sum(math.prod(size) * kind.itemsize for _, size, kind in travels)
    entries = max(math.prod(shape), 1)
    per_row = float(getattr(encoding, "row_bytes", 0.0)) if is_matrix(shape, dtype) else 0.0
    bits = getattr(encoding, "bits", None) if is_matrix(shape, dtype) else None
    if bits is not None:
        return bits / 8, per_row
    return total / entries, per_row
