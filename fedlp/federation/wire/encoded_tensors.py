"""Tensors that stay encoded in memory: rows of a matrix are widened when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedlp.federation.wire.digests import digest_parts
from fedlp.federation.wire.encodings.base import Encoding, RowEncoding, is_matrix
from fedlp.federation.wire.packing import Signature
from fedlp.federation.wire.ranges import check_values

_WIDENED = 1 << 20  # entries that are widened at once, where rows can be


def widened_entries(encoding: Encoding, rows: int, columns: int) -> int:
    """Return the most entries of an encoded matrix that are widened at once."""
    return _step(encoding, rows, columns) * columns


def _step(encoding: Encoding, rows: int, columns: int) -> int:
    """Return the rows of a matrix that are widened at once."""
    has_rows = isinstance(encoding, RowEncoding) and encoding.has_rows(columns)
    return min(rows, max(1, _WIDENED // columns)) if has_rows else rows


class EncodedWeight:
    """Encoded matrix; its rows are widened when they are read, and not kept.

    Parameters
    ----------
    encoded : mapping from name to Tensor
        Its encoded tensors. Not modified, nor copied on their device.
    shape : (int, int)
        Shape of the matrix.

    Attributes
    ----------
    step : int
        Rows to read at once; all of them where the encoding cannot decode some alone.
    """

    dtype = torch.float32  # of what is read

    def __init__(
        self, encoding: Encoding, name: str, encoded: Mapping[str, Tensor], shape: tuple[int, int], device: torch.device
    ) -> None:
        self.encoding, self.name, self.shape, self.device = encoding, name, shape, device
        self._encoded = {part: tensor.to(device) for part, tensor in encoded.items()}
        self.step = _step(encoding, *shape)
        self._has_rows = isinstance(encoding, RowEncoding) and encoding.has_rows(shape[1])

    def rows(self, start: int, stop: int) -> Tensor:
        """Return consecutive rows, (stop - start, columns) float32."""
        return self._read(slice(start, stop))

    def take(self, index: Tensor) -> Tensor:
        """Return rows at positions of any shape, (..., columns) float32."""
        return self._read(index.flatten()).view(*index.shape, self.shape[1])

    def _read(self, rows: slice | Tensor) -> Tensor:
        if self._has_rows and isinstance(self.encoding, RowEncoding):
            return self.encoding.decode_rows(self._encoded, self.name, self.shape[1], rows)
        signature = ((self.name, self.shape, self.dtype),)
        return self.encoding.decode(self._encoded, signature, "the base")[self.name][rows]


class EncodedTensors:
    """Frozen tensors of a sub-model as they were sent.

    Parameters
    ----------
    encoded : mapping from name to Tensor
        Encoded tensors of ``signature``; views into a message may serve.
    signature : Signature
        Names, shapes and dtypes of the decoded tensors.
    """

    def __init__(self, encoding: Encoding, encoded: Mapping[str, Tensor], signature: Signature) -> None:
        self._encoding, self.encoded = encoding, encoded
        self._shapes = {name: (shape, dtype) for name, shape, dtype in signature}

    @property
    def is_whole(self) -> bool:
        """Whether no encoded tensor is missing, of another shape or dtype, or of another sub-model."""
        signature = tuple((name, shape, dtype) for name, (shape, dtype) in self._shapes.items())
        wanted = {name: (shape, dtype) for name, shape, dtype in self._encoding.signature(signature)}
        return {name: (tuple(x.shape), x.dtype) for name, x in self.encoded.items()} == wanted

    def weight(self, name: str, device: torch.device) -> EncodedWeight:
        """Return one matrix, which stays encoded."""
        shape, _ = self._shapes[name]
        return EncodedWeight(self._encoding, name, self._parts(name), (shape[0], shape[1]), device)

    def decode(self, left: frozenset[str] = frozenset()) -> Iterator[tuple[str, Tensor]]:
        """Yield name and values of every tensor but those in ``left``, one at a time."""
        for name, (shape, dtype) in self._shapes.items():
            if name not in left:
                decoded = self._encoding.decode(self._parts(name), ((name, shape, dtype),), "the server's message")
                yield name, decoded[name]

    def check(self, who: str) -> None:
        """Raise ProtocolError, as :meth:`Encoding.decode` and ``check_values`` do, without holding the values."""
        for name, (shape, dtype) in self._shapes.items():
            if isinstance(self._encoding, RowEncoding) and is_matrix(shape, dtype):
                self._encoding.check_scales(self.encoded, name, who)
            for part in self._values(name):
                check_values({name: part}, who)

    def digest(self) -> bytes:
        """Return the digest of the decoded tensors, without holding them."""
        return digest_parts((name, dtype, shape, self._values(name)) for name, (shape, dtype) in self._sorted())

    def _sorted(self) -> list[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
        return sorted(self._shapes.items())

    def _values(self, name: str) -> Iterator[Tensor]:
        """Yield the values of a tensor, of a matrix a few rows at a time."""
        shape, dtype = self._shapes[name]
        if dtype != torch.float32 or len(shape) != 2 or not all(shape):
            yield self._encoding.decode(self._parts(name), ((name, shape, dtype),), "the server's message")[name]
            return
        weight = self.weight(name, torch.device("cpu"))
        for start in range(0, shape[0], weight.step):
            yield weight.rows(start, min(start + weight.step, shape[0]))

    def _parts(self, name: str) -> dict[str, Tensor]:
        """Return the encoded tensors of one tensor."""
        shape, dtype = self._shapes[name]
        return {part: self.encoded[part] for part, _, _ in self._encoding.signature(((name, shape, dtype),))}
