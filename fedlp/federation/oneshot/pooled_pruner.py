"""Pruner without own data: second moments, Fisher information and batch norms come from clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from fedlp.errors import ConfigError
from fedlp.federation.oneshot import messages as wire
from fedlp.federation.oneshot.messages import Part, Question
from fedlp.federation.oneshot.model import (
    ModelStates,
    count_positions,
    fisher_parts,
    moment_parts,
    norm_parts,
    norm_statistics,
    read_moments,
    split_reference,
)
from fedlp.federation.oneshot.server import ClientPool
from fedlp.pruning.gradients import pool_fisher
from fedlp.pruning.layer_statistics import Collector, make_readers
from fedlp.pruning.pruner import Calibration, Pruner
from fedlp.pruning.reader_layers import Method, Reader
from fedlp.pruning.scores.criterion import UnitScore, score_name
from fedlp.pruning.tracing.widths import WidthSpec, cut_model
from fedlp.types import Keep, PrunableLayer


def check_pooled(score: UnitScore) -> None:
    """Raise ConfigError if a score reads statistics that clients do not send."""
    if missing := score.needs & {"gradients", "model"}:
        raise ConfigError(
            f"score {score_name(score)} needs {' and '.join(sorted(missing))}, which clients do not send; choose "
            "another pruner, or strategy.unit_selection=client"
        )


class PooledPruner(Pruner):
    """Pruner whose statistics are requested from clients.

    Parameters
    ----------
    model, spec, layers, method
        As of :class:`Pruner`.
    example : Tensor
        Inputs of a few synthetic examples.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: WidthSpec,
        layers: Sequence[PrunableLayer],
        method: Method,
        pool: ClientPool,
        example: Tensor,
        seed: int,
    ) -> None:
        check_pooled(method.score)
        self.pool = pool
        self._example = example
        super().__init__(model, spec, layers, Calibration([example], [], seed), method)

    @cached_property
    def states(self) -> ModelStates:
        """States of the model so far."""
        return ModelStates(self.model, self.layers, self.norms, self.method)

    @cached_property
    def positions(self) -> tuple[Mapping[str, int], int]:
        """Input vectors of each reader, and labels, per example."""
        return count_positions(self.model, self.layers, self._example)

    def collector(self, dense: nn.Module | None) -> PooledCollector:
        """Return the collector of clients' statistics of each layer."""
        return PooledCollector(self, dense is not None)

    def output_fisher(self, paths: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the Fisher information of all readers' outputs on the clients' examples."""
        parts, question = fisher_parts(self.model, self.layers), Question(wire.FISHER)
        shrinks, labels = self.method.shrinks, self.positions[1]
        found = self.ask(question, parts)
        halves = [
            ({path: sums[path].tril() + sums[path].tril(-1).T for path in paths}, sum(counts) * labels)
            for sums, counts in found
        ]
        if not shrinks:
            return {path: total / halves[0][1] for path, total in halves[0][0].items()}
        return {path: pool_fisher([(sums[path], count) for sums, count in halves]) for path in paths}

    def ask(self, question: Question, parts: Sequence[Part]) -> list[tuple[dict[str, Tensor], list[int]]]:
        """Return the clients' sums and example counts, by halves where the method shrinks what they give."""
        if self.method.shrinks:
            return self.pool.halves(question, parts, self.states)
        return [self.pool.total(question, parts, self.states)]

    @torch.no_grad()
    def finish(self, widths: Mapping[str, Keep]) -> nn.Module:
        """Return the model with the removed units cut out, and batch norm statistics on the clients' examples."""
        parts = norm_parts(self.model)
        if parts and not self.method.keeps_batch_norm:
            sums, counts = self.pool.total(Question(wire.NORMS), parts, self.states)
            batches = sum(-(-count // self.pool.batch_size) for count in counts)
            for name, live in norm_statistics(self.model).items():
                live.copy_(sums[name] / batches)
                self.model.get_submodule(name.rpartition(".")[0]).num_batches_tracked.fill_(batches)  # type: ignore[operator]
        return cut_model(self.model, self.spec, widths)


class PooledCollector:
    """Collector of statistics of layers from clients.

    Inputs are measured from their values on the example, so that sums of similar inputs stay small.
    """

    def __init__(self, pruner: PooledPruner, targets: bool) -> None:
        self._pruner, self._targets = pruner, targets
        self._example = Collector(pruner.model, None, pruner.layers, pruner.data.batches, pruner.norms)

    def readers(self, layer: PrunableLayer) -> list[Reader]:
        """Return the layer's readers, without statistics."""
        pruner = self._pruner
        return make_readers(pruner.model, layer, pruner.norms, self._targets, pruner.method.shrinks)

    def collect(self, layer: PrunableLayer) -> list[Reader]:
        """Return the layer's readers with the clients' statistics added up."""
        pruner, readers = self._pruner, self.readers(layer)
        parts = moment_parts(readers, pruner.method, pruner.positions[0])
        reference = torch.cat([reader.moments.mean for reader in self._example.collect(layer)]).float()
        if not any(part.symmetric for part in parts):
            reference.zero_()  # a diagonal needs no digits to spare, and must not become negative
        question = Question(wire.MOMENTS, list(pruner.layers).index(layer), reference)
        origins, found = split_reference(reference, readers), pruner.ask(question, parts)
        for reader in readers:
            path, positions = reader.path, pruner.positions[0][reader.path]
            halves = [read_moments(path, sums, positions * sum(counts), origins[path]) for sums, counts in found]
            reader.moments = sum(halves[1:], halves[0])
            if reader.half is not None and len(halves) > 1:
                reader.half = halves[0]
        return readers

    def reach(self, layer: PrunableLayer) -> None:
        """Go on to a layer; clients do so when they are asked about it."""

    def close(self) -> None:
        """Release what is held between layers."""
        self._example.close()
