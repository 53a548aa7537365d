"""Updates of a round kept for a second pass: in memory up to a limit, beyond it in a temporary file."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from fedlp.errors import FedLPError, one_line
from fedlp.federation.aggregation.coverage import Keeps
from fedlp.federation.aggregation.coverage_average import WeightedUpdate

MEMORY, LARGEST = 1 << 28, 1 << 24  # bytes of updates kept in memory, in all and each


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


@dataclass(frozen=True, slots=True)
class _Stack:
    """Updates of several clients, (clients, ...), that cover the same entries."""

    stacks: Mapping[str, Tensor]
    keeps: Mapping[str, Keeps]
    weights: Sequence[float]

    def each(self) -> Iterator[WeightedUpdate]:
        """Yield the update of each client."""
        for k, weight in enumerate(self.weights):
            yield {name: stack[k] for name, stack in self.stacks.items()}, self.keeps, weight


class StoredUpdates:
    """Updates in the order of their arrival.

    Parameters
    ----------
    memory : int
        Bytes of updates kept in memory.
    largest : int
        Bytes of the largest update kept in memory. Larger ones, and those beyond ``memory``, lie in an unnamed file of
        the folder for temporary files (``TMPDIR``), readable by this process alone.
    """

    def __init__(self, memory: int = MEMORY, largest: int = LARGEST) -> None:
        self._left, self._largest = memory, largest
        self._updates: list[WeightedUpdate | _Filed | _Stack] = []
        self._file: IO[bytes] | None = None

    def add(self, params: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weight: float) -> None:
        """Keep an update; its tensors are not to be modified.

        Raises
        ------
        FedLPError
            If the file cannot be written.
        """
        size = sum(values.nbytes for values in params.values())
        if size <= min(self._left, self._largest):
            self._left -= size
            self._updates.append((params, keeps, weight))
            return
        try:
            self._updates.append(self._write(params, keeps, weight))
        except OSError as error:
            raise FedLPError(
                f"the round's updates do not fit into {tempfile.gettempdir()}: {one_line(error)}; free space there, "
                "set TMPDIR to a larger folder, or aggregator.max_norm=null in a new run"
            ) from error

    def add_stack(self, stacks: Mapping[str, Tensor], keeps: Mapping[str, Keeps], weights: Sequence[float]) -> None:
        """Keep updates of several clients that cover the same entries: :meth:`add` of each in turn."""
        size = sum(stack.nbytes for stack in stacks.values())
        if weights and size <= min(self._left, self._largest * len(weights)):
            self._left -= size
            self._updates.append(_Stack(stacks, keeps, weights))
            return
        for update in _Stack(stacks, keeps, weights).each():
            self.add(*update)

    def __iter__(self) -> Iterator[WeightedUpdate]:
        """Yield the updates; those of the file in memory of their own."""
        for update in self._updates:
            match update:
                case _Filed():
                    yield self._read(update)
                case _Stack():
                    yield from update.each()
                case _:
                    yield update

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
