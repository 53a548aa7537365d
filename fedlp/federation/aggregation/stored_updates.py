"""Updates of a round kept for a second pass: in memory up to a limit, the others in a temporary file."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from fedlp.errors import FedLPError, one_line
from fedlp.federation.aggregation.coverage import Keeps
from fedlp.federation.aggregation.coverage_average import GROUP_BYTES, WeightedUpdate


@dataclass(frozen=True, slots=True)
class _Filed:
    """Where an update lies in the file.

    Attributes
    ----------
    start, length : int
        Bytes of the file.
    tensors : mapping from tensor name to (dtype, shape, offset)
        Offsets in bytes behind ``start``.
    """

    start: int
    length: int
    tensors: Mapping[str, tuple[torch.dtype, torch.Size, int]]
    keeps: Mapping[str, Keeps]
    weight: float


class StoredUpdates:
    """Updates in the order of their arrival.

    Parameters
    ----------
    memory : int
        Bytes of updates kept in memory. Those beyond lie in an unnamed file of the folder for temporary files
        (``TMPDIR``), readable by this process alone.
    """

    def __init__(self, memory: int = GROUP_BYTES) -> None:
        self._left = memory
        self._updates: list[WeightedUpdate | _Filed] = []
        self._file: IO[bytes] | None = None

    def add(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weight: float) -> None:
        """Keep an update; its tensors are not to be modified.

        Raises
        ------
        FedLPError
            If the file cannot be written.
        """
        size = sum(values.nbytes for values in params.values())
        if size <= self._left:
            self._left -= size
            self._updates.append((params, keeps, weight))
            return
        self._left = 0  # so that later ones follow in the file
        try:
            self._updates.append(self._write(params, keeps, weight))
        except OSError as error:
            raise FedLPError(
                f"the round's updates do not fit into {tempfile.gettempdir()}: {one_line(error)}; free space there, "
                "set TMPDIR to a larger folder, or aggregator.max_norm=null in a new run"
            ) from error

    def __iter__(self) -> Iterator[WeightedUpdate]:
        """Yield the updates; those of the file in memory of their own."""
        for update in self._updates:
            yield self._read(update) if isinstance(update, _Filed) else update

    def _write(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weight: float) -> _Filed:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 # lives as long as this object
            weakref.finalize(self, self._file.close)
        start, offset = self._file.seek(0, 2), 0
        tensors: dict[str, tuple[torch.dtype, torch.Size, int]] = {}
        for name, values in params.items():
            padding = -offset % values.element_size()
            self._file.write(bytes(padding))
            self._file.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            tensors[name] = values.dtype, values.shape, offset + padding
            offset += padding + values.nbytes
        self._file.flush()
        return _Filed(start, offset, tensors, keeps, weight)

    def _read(self, filed: _Filed) -> WeightedUpdate:
        assert self._file is not None
        image = torch.empty(filed.length, dtype=torch.uint8)
        self._file.seek(filed.start)
        self._file.readinto(image.numpy())  # type: ignore[attr-defined] # typeshed: of any file
        params = {
            name: image[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (dtype, shape, offset) in filed.tensors.items()
        }
        return params, filed.keeps, filed.weight
