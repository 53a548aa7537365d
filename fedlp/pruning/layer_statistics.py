"""Statistics of the inputs of each layer's readers, in a model that is pruned layer by layer, and in the dense one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fedlp.errors import CalibrationError
from fedlp.pruning.calibration import split_examples, split_rows
from fedlp.pruning.kernels.hessian import DiagonalMoments
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

    def reach(self, layer: PrunableLayer) -> None:
        """Go on to a layer whose statistics are not needed, before it changes."""

    def close(self) -> None:
        """Release all state between layers."""


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
        also makes up for the drift of the stream. Of a language model this may be ``model`` itself: each block is
        copied before it changes.
    norms : mapping from path to path
        The batch norms that follow readers.
    halves : bool
        Whether readers also get the moments of every other example by themselves; of a single example, of the first
        first half of its vectors.
    diagonal : bool
        Whether means and mean squares are all that is collected.
    pauses : bool
        Whether batches wait within a block, as those of :class:`~fedlp.pruning.staged_forward.StagedRun`; a matter of
        speed only.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module | None,
        layers: Sequence[PrunableLayer],
        batches: Sequence[Tensor],
        norms: Mapping[str, str],
        halves: bool = False,
        diagonal: bool = False,
        pauses: bool = False,
    ) -> None:
        self._model, self._layers, self._norms, self._halves = model, layers, norms, halves
        self._num_batches, self._diagonal = len(batches), diagonal
        self._firsts = split_examples(batches)
        self._run = StagedRun(model, batches, pauses)
        self._dense = None if dense is None else StagedRun(dense, batches)
        self._is_language = is_language_model(model)
        self._copies = self._is_language and dense is model
        self._has_stream = self._is_language and adds_to_stream(model)
        self._copy_stage()

    def close(self) -> None:
        """End what waits within a block."""
        self._run.close()

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
        self.reach(layer)
        earlier = self._earlier(layer) if self._dense is not None else []
        watched = [self._model.get_submodule(path) for path in (*earlier, *layer.readers)]
        readers = self.readers(layer)
        for reader in readers if self._diagonal else ():
            reader.diagonal = DiagonalMoments.empty(reader.weight.shape[1], reader.weight.device)
        for batch in range(self._num_batches):
            found, passed = self._run.enter(batch, watched[len(earlier) :], watched[: len(earlier)])
            aims: list[Tensor | None] = [None] * len(readers)
            if self._dense is not None:
                aims = self._aims(self._dense, batch, passed, [*earlier, *layer.readers], readers)
            for reader, inputs, aim in zip(readers, found, aims, strict=True):
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

    def reach(self, layer: PrunableLayer) -> None:
        """Go on to a layer, before it changes; layers come in the order of the model."""
        while self._run.current < self._run.stage_of(layer.readers[0]):
            self._run.advance()
            if self._dense is not None:
                self._dense.advance()
            self._copy_stage()

    def _add(self, reader: Reader, batch: int, columns: Tensor, aim: Tensor | None) -> None:
        """Add vectors and targets to a reader's moments; where there are halves, only the rest to those of all."""
        if reader.diagonal is not None:
            reader.diagonal.add(columns)
            return
        if reader.half is None:
            reader.moments.add(columns, aim)
            return
        is_alone = sum(map(len, self._firsts)) == 1
        first = split_rows(self._firsts[batch], len(columns), is_alone).to(columns.device)
        for moments, rows in ((reader.half, first), (reader.moments, ~first)):
            moments.add(columns[rows], None if aim is None else aim[rows])

    def _copy_stage(self) -> None:
        """Copy the current block for the dense run, before it changes."""
        if self._copies and self._dense is not None and self._dense.current < len(self._dense.stages):
            number = self._dense.current
            if number:
                self._dense.stages[number - 1] = self._run.stages[number - 1]  # the copy of it goes
            self._dense.stages[number] = copy.deepcopy(self._run.stages[number])

    def _earlier(self, layer: PrunableLayer) -> list[str]:
        """Return the readers of the same block that come before: their outputs are in the residual stream."""
        if not self._has_stream:
            return []
        before = self._layers[: self._layers.index(layer)]
        paths = [path for other in before for path in other.readers]
        return [path for path in paths if self._run.stage_of(path) == self._run.current]

    def _paths_of(self, dense: StagedRun, paths: Sequence[str]) -> Sequence[str]:
        """Return the readers whose dense outputs are recorded: of a block that runs once, all of its readers."""
        if not self._is_language:
            return paths
        every = [path for layer in self._layers for path in layer.readers]
        return [path for path in every if dense.stage_of(path) == dense.current]

    def _aims(
        self,
        dense: StagedRun,
        batch: int,
        passed: Sequence[Tensor],
        paths: Sequence[str],
        readers: Sequence[Reader],
    ) -> list[Tensor | None]:
        """Return each reader's target: the dense model's output and, in a block, the drift of the stream."""
        stage, prefix = dense.stages[dense.current], dense.paths[dense.current]
        modules = {path: stage.get_submodule(path.removeprefix(prefix)) for path in self._paths_of(dense, paths)}
        if self._is_language:
            found = dict(zip(modules, dense.outputs(batch, list(modules.values())), strict=True))
        else:
            found = dict(zip(modules, (y for _, y in dense.observe(batch, list(modules.values()))), strict=True))
        wanted = [found[path] for path in paths]
        outputs = wanted[len(passed) :]
        if self._has_stream:
            lacking = dense.input(batch) - self._run.input(batch)
            for was, output in zip(passed, wanted[: len(passed)], strict=True):
                lacking = lacking + (output - was).reshape_as(lacking)
            outputs = [output + lacking.reshape_as(output) for output in outputs]
        return [output_rows(reader.module, output) for reader, output in zip(readers, outputs, strict=True)]
