"""Statistics of the inputs of each layer's readers, in a model that is pruned layer by layer, and in the dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fedlp.errors import CalibrationError
from fedlp.pruning.calibration import split_examples, split_rows
from fedlp.pruning.reader_layers import Reader
from fedlp.pruning.staged_forward import StagedRun
from fedlp.pruning.tracing.decoder import adds_to_stream, is_language_model
from fedlp.pruning.tracing.units import input_columns, output_rows
from fedlp.types import PrunableLayer


class Collects(Protocol):
    """Source of the statistics of each layer, for central or distributed data."""

    def readers(self, layer: PrunableLayer) -> list[Reader]:
        """Return the layer's readers, without statistics."""

    def collect(self, layer: PrunableLayer) -> list[Reader]:
        """Return the layer's readers with the statistics of their inputs."""


def make_readers(
    model: nn.Module, layer: PrunableLayer, norms: Mapping[str, str], targets: bool, halves: bool = False
) -> list[Reader]:
    """Return a layer's readers, without statistics; ``norms`` are the paths of the batch norms that follow them."""
    found = []
    for path in layer.readers:
        norm = model.get_submodule(norms[path]) if path in norms else None
        found.append(Reader(path, model.get_submodule(path), norm, layer.num_units, targets, halves))
    return found


class Collector:
    """Collector of statistics, layer by layer in the order of the model.

    Parameters
    ----------
    model : nn.Module
        May change between layers: statistics of a layer include all earlier changes.
    dense : nn.Module or None
        The dense model, if readers are to be fitted to its outputs. In blocks that add to a residual stream the target
        also makes up for the drift of the stream.
    norms : mapping from path to path
        The batch norms that follow readers.
    halves : bool
        Whether readers also get the moments of every other example by themselves; of a single example, of the first
        half of its vectors.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module | None,
        layers: Sequence[PrunableLayer],
        batches: Sequence[Tensor],
        norms: Mapping[str, str],
        halves: bool = False,
    ) -> None:
        self._model, self._layers, self._norms, self._halves = model, layers, norms, halves
        self._num_batches = len(batches)
        self._firsts = split_examples(batches)
        self._run = StagedRun(model, batches)
        self._dense = None if dense is None else StagedRun(dense, batches)
        self._has_stream = is_language_model(model) and adds_to_stream(model)

    def readers(self, layer: PrunableLayer) -> list[Reader]:
        """Return the layer's readers, without statistics."""
        return make_readers(self._model, layer, self._norms, self._dense is not None, self._halves)

    def collect(self, layer: PrunableLayer, origins: Mapping[str, Tensor] | None = None) -> list[Reader]:
        """Return the layer's readers with the statistics of their inputs; layers come in the order of the model.

        Parameters
        ----------
        origins : mapping from path to (n,), optional
            Origin that is subtracted from each reader's inputs.
        """
        while self._run.current < self._run.stage_of(layer.readers[0]):
            self._run.advance()
            if self._dense is not None:
                self._dense.advance()
        earlier = self._earlier(layer) if self._dense is not None else []
        watched = [self._model.get_submodule(path) for path in (*earlier, *layer.readers)]
        readers = self.readers(layer)
        for batch in range(self._num_batches):
            seen = self._run.observe(batch, watched)
            aims: list[Tensor | None] = [None] * len(readers)
            if self._dense is not None:
                aims = self._aims(self._dense, batch, seen, [*earlier, *layer.readers], readers)
            for reader, (inputs, _), aim in zip(readers, seen[len(earlier) :], aims, strict=True):
                columns = input_columns(reader.module, inputs)
                if not bool(torch.isfinite(columns).all()):
                    raise CalibrationError(
                        f"layer {layer.name}: inputs of {reader.path} are not finite on the calibration data; check "
                        "the model's weights and the data set"
                    )
                if origins is not None:
                    columns = columns.to(torch.float64) - origins[reader.path]
                self._add(reader, batch, columns, aim)
        for reader in readers:
            if reader.half is not None:
                reader.moments.include(reader.half)
        return readers

    def _add(self, reader: Reader, batch: int, columns: Tensor, aim: Tensor | None) -> None:
        """Add vectors and targets to a reader's moments; where there are halves, only the rest to those of all."""
        if reader.half is None:
            reader.moments.add(columns, aim)
            return
        is_alone = sum(map(len, self._firsts)) == 1
        first = split_rows(self._firsts[batch], len(columns), is_alone).to(columns.device)
        for moments, rows in ((reader.half, first), (reader.moments, ~first)):
            moments.add(columns[rows], None if aim is None else aim[rows])

    def _earlier(self, layer: PrunableLayer) -> list[str]:
        """Return the readers of the same block that come before: their outputs are in the residual stream."""
        if not self._has_stream:
            return []
        before = self._layers[: self._layers.index(layer)]
        paths = [path for other in before for path in other.readers]
        return [path for path in paths if self._run.stage_of(path) == self._run.current]

    def _aims(
        self,
        dense: StagedRun,
        batch: int,
        seen: Sequence[tuple[Tensor, Tensor]],
        paths: Sequence[str],
        readers: Sequence[Reader],
    ) -> list[Tensor | None]:
        """Return each reader's target: the dense model's output and, in a block, the drift of the stream."""
        stage, prefix = dense.stages[dense.current], dense.paths[dense.current]
        wanted = dense.observe(batch, [stage.get_submodule(path.removeprefix(prefix)) for path in paths])
        num_earlier = len(paths) - len(readers)
        outputs = [output for _, output in wanted[num_earlier:]]
        if self._has_stream:
            lacking = dense.input(batch) - self._run.input(batch)
            for (_, was), (_, output) in zip(seen[:num_earlier], wanted[:num_earlier], strict=True):
                lacking = lacking + (output - was).reshape_as(lacking)
            outputs = [output + lacking.reshape_as(output) for output in outputs]
        return [output_rows(reader.module, output) for reader, output in zip(readers, outputs, strict=True)]
