"""Layer-wise pruning of one model on calibration data; statistics of a layer include all earlier pruning.

During pruning, removed units are silenced: their columns in the readers' weights are zero. At the
end all their parameters are cut out at once, which gives the same outputs and a smaller dense model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.errors import AllocationError
from fedlp.models.forward import forward_logits
from fedlp.pruning.batch_norms import following_batch_norms, reestimate_batch_norms
from fedlp.pruning.calibration import Calibration, leading_examples
from fedlp.pruning.gradients import loss_gradients, output_fisher, shrunk_fisher
from fedlp.pruning.kernels.obs import Elimination
from fedlp.pruning.layer_state import layer_state, restore_layer
from fedlp.pruning.layer_statistics import Collector, Collects, make_readers
from fedlp.pruning.reader_layers import Method, Reader
from fedlp.pruning.scores.criterion import UnitScore, removal_order
from fedlp.pruning.scores.evidence import Evidence
from fedlp.pruning.scores.view import LayerView
from fedlp.pruning.tracing.decoder import is_language_model
from fedlp.pruning.tracing.units import weight_matrix
from fedlp.pruning.tracing.widths import WidthSpec, cut_in_place, cut_model
from fedlp.types import Keep, PrunableLayer

__all__ = ["Calibration", "LayerReport", "Method", "Pruned", "Pruner"]


log = logging.getLogger("fedlp")

_FISHER, _RNG = "fisher", "rng"  # in a store
_FISHER_VECTORS = 4  # positions of text per output that are sufficient for the Fisher information
_FEW = 10  # calibration vectors per input, below which a line says so


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Result of pruning one layer.

    Attributes
    ----------
    loss : float
        In units of the layer's squared output error, weighed by Fisher information with ``fisher``; NaN if
        the score gives no losses.
    """

    name: str
    num_units: int
    kept_units: int
    loss: float


@dataclass(frozen=True)
class Pruned:
    """A pruned model, the units that it keeps and a report of each layer.

    Attributes
    ----------
    widths : mapping from layer name to Keep
        In units of the dense model.
    """

    model: nn.Module
    widths: Mapping[str, Keep]
    layers: tuple[LayerReport, ...]


class Store(Protocol):
    """Store of finished parts of a pruning, by name."""

    def load(self, name: str) -> Mapping[str, Tensor] | None:
        """Return the tensors of a part; None if it is not there."""

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of a part."""


class Pruner:
    """Pruner of one model with one method.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode; not modified.
    spec : WidthSpec
        Its width axes.
    layers : sequence of PrunableLayer
        Layers to remove units from, in the order of the model.
    in_place : bool
        Whether the model itself is pruned, without a copy.
    store : Store or None
        Store of finished layers: stored ones are taken over, with the same result.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: WidthSpec,
        layers: Sequence[PrunableLayer],
        data: Calibration,
        method: Method,
        in_place: bool = False,
        store: Store | None = None,
    ) -> None:
        self._store = store
        self.spec, self.layers, self.data, self.method, self.in_place = spec, layers, data, method, in_place
        self.model = model.eval() if in_place else cut_model(model, spec, {}).eval()
        self._rng = torch.Generator().manual_seed(data.seed)
        self.norms = following_batch_norms(self.model, data.batches[0])
        self._fisher: Mapping[str, Tensor] = {}
        if method.fisher:
            self._fisher = self._stored_fisher([path for layer in layers for path in layer.readers])
        gradients = None
        if "gradients" in method.score.needs:
            gradients = loss_gradients(self.model, data.batches, data.labels, data.loss)
        self._evidence = Evidence(self.model, spec, data, self._rng, gradients)

    def num_added_params(self) -> int:
        """Return the number of parameters that pruning adds: the biases that readers get."""
        modules = {path: self.model.get_submodule(path) for layer in self.layers for path in layer.readers}
        return sum(
            len(weight_matrix(module))
            for path, module in modules.items()
            if self.method.adds_bias and path not in self.norms and getattr(module, "bias", None) is None
        )

    # ----------------------------------------------------------------------------------------------------------- prune
    def prune(self, kept: Mapping[str, int], progress: Callable[[LayerReport], None] = lambda _: None) -> Pruned:
        """Return the model with ``kept`` units of each layer; may be called once.

        Parameters
        ----------
        kept : mapping from layer name to int
            Units that stay, in [least, num_units].
        progress : callable
            Called with the report of each layer when it is done.

        Raises
        ------
        AllocationError
            If a layer cannot keep that many units.
        CalibrationError
            If the calibration data are too few for a layer or give non-finite values; names it.
        """
        for layer in self.layers:
            if not layer.least <= kept[layer.name] <= layer.num_units:
                raise AllocationError(f"layer {layer.name}: cannot keep {kept[layer.name]} of {layer.num_units} units")
        collector = self._collector()
        widths: dict[str, Keep] = {}
        reports, few = [], dict[str, int]()
        for layer in self.layers:
            count, loss = layer.num_units - kept[layer.name], 0.0
            keep = torch.arange(layer.num_units)
            stored = None if self._store is None else self._store.load(layer.name)
            if stored is not None:
                if collector is not None:
                    collector.reach(layer)
                keep, loss = restore_layer(self.model, layer, self.norms, stored, self._rng)
            elif count or self.method.corrects:
                readers = self.readers(layer) if collector is None else collector.collect(layer)
                removed, loss = self._choose(layer, readers, count)
                keep = self._rewrite(layer, readers, removed)
                if self.method.needs_moments:
                    few |= {r.path: r.moments.count for r in readers if r.moments.count < _FEW * r.weight.shape[1]}
            if stored is None and self._store is not None:
                self._store.save(layer.name, layer_state(self.model, layer, self.norms, keep, loss, self._rng))
            widths[layer.name] = Keep.from_indices(keep.numpy(), layer.num_units)
            reports.append(LayerReport(layer.name, layer.num_units, len(keep), loss))
            progress(reports[-1])
        if collector is not None:
            collector.close()
        self._warn_of_few(few)
        return Pruned(self.finish(widths).eval(), widths, tuple(reports))

    def _warn_of_few(self, counts: Mapping[str, int]) -> None:
        """Warn of readers with few calibration vectors per input; ``counts`` are theirs by path."""
        if counts:
            inputs = {path: weight_matrix(self.model.get_submodule(path)).shape[1] for path in counts}
            path = min(counts, key=lambda path: counts[path] / inputs[path])
            log.warning(
                "Few calibration vectors: %.1f per input of %s, and fewer than %d for %d layers in all. More "
                "(calibration.examples) would prune better.",
                counts[path] / inputs[path],
                path,
                _FEW,
                len(counts),
            )

    def refit(self, keeps: Mapping[str, Tensor]) -> nn.Module:
        """Return the uncut model with removed units silenced and readers refitted; may be called once.

        Parameters
        ----------
        keeps : mapping from layer name to int64 Tensor
            Units that stay, sorted; a layer that is absent keeps all.
        """
        collector = self._collector()
        for layer in self.layers:
            if layer.name in keeps:
                everything = torch.arange(layer.num_units)
                readers = self.readers(layer) if collector is None else collector.collect(layer)
                self._rewrite(layer, readers, everything[~torch.isin(everything, keeps[layer.name])])
        if collector is not None:
            collector.close()
        return self.model

    # ----------------------------------------------------------------------- access to data, for subclasses to override
    def collector(self, dense: nn.Module | None) -> Collects:
        """Return the collector of the layers' statistics, and of the dense model's outputs if given."""
        method, batches = self.method, self.data.batches
        diagonal = not method.needs_moments
        return Collector(self.model, dense, self.layers, batches, self.norms, method.shrinks, diagonal, pauses=True)

    def output_fisher(self, paths: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the Fisher information of some readers' outputs, as :func:`gradients.output_fisher` does."""
        logits_only = not is_language_model(self.model)
        data, measure = self.data, shrunk_fisher if self.method.shrinks else output_fisher
        batches = data.batches
        if not logits_only:
            widest = max(len(weight_matrix(self.model.get_submodule(path))) for path in paths)
            batches = leading_examples(batches, _FISHER_VECTORS * widest)
        return measure(self.model, paths, batches, self._rng, logits_only, data.shift_invariant)

    def finish(self, widths: Mapping[str, Keep]) -> nn.Module:
        """Return the model with the removed units cut out and its batch norms' statistics re-estimated."""
        model = (cut_in_place if self.in_place else cut_model)(self.model, self.spec, widths)
        if not self.method.keeps_batch_norm:
            reestimate_batch_norms(model, self.data.batches)
        return model

    # ------------------------------------------------------------------------------------------------------- one layer
    def _collector(self) -> Collects | None:
        """Return the collector of the layers' statistics; None where the method needs none of them."""
        if not self.method.needs_inputs:
            return None
        if not self.method.corrects:
            return self.collector(None)
        return self.collector(self.model if is_language_model(self.model) else cut_model(self.model, self.spec, {}))

    def readers(self, layer: PrunableLayer) -> list[Reader]:
        """Return a layer's readers, without statistics."""
        return make_readers(self.model, layer, self.norms, False)

    def view(self, layer: PrunableLayer, readers: Sequence[Reader], score: UnitScore | None = None) -> LayerView:
        """Return the view of a layer with statistics for a score, by default the method's."""
        score = self.method.score if score is None else score
        views = tuple(reader.view(self.method, score, self._fisher.get(reader.path)) for reader in readers)
        return LayerView(layer, self._evidence, score.needs, views)

    def removal_order(self, layer: PrunableLayer, readers: Sequence[Reader], count: int) -> Elimination:
        """Return the order in which the method's score removes ``count`` units, and the losses along it."""
        return removal_order(self.method.score, self.view(layer, readers), count)

    def _stored_fisher(self, paths: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the Fisher information of the store, or compute and store it; with the draws after it."""
        if self._store is None:
            return self.output_fisher(paths)
        stored = self._store.load(_FISHER)
        if stored is None:
            found = self.output_fisher(paths)
            self._store.save(_FISHER, {**found, _RNG: self._rng.get_state()})
            return found
        self._rng.set_state(stored[_RNG])
        return {path: stored[path] for path in paths}

    def _choose(self, layer: PrunableLayer, readers: Sequence[Reader], count: int) -> tuple[Tensor, float]:
        """Return the units to remove, and the loss after their removal."""
        if not count:
            return torch.empty(0, dtype=torch.int64), 0.0
        found = self.removal_order(layer, readers, count)
        return torch.tensor(found.order), found.losses[-1]

    def _rewrite(self, layer: PrunableLayer, readers: Sequence[Reader], removed: Tensor) -> Tensor:
        """Write the readers' new weights; return the kept units."""
        everything = torch.arange(layer.num_units)
        gone = torch.isin(everything, removed)
        for reader in readers:
            reader.rewrite(everything[~gone], everything[gone], self.method)
        return everything[~gone]


@torch.no_grad()
def predictions(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """Return log probabilities, (labels, classes), by batch."""
    return [forward_logits(model, batch).flatten(0, -2).log_softmax(dim=-1) for batch in batches]


def mean_divergence(dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> float:
    """Return the mean KL divergence, in nats per label, of log probabilities by batch."""
    total = sum(float(F.kl_div(q, p, log_target=True, reduction="sum")) for p, q in zip(dense, pruned, strict=True))
    return total / sum(len(batch) for batch in dense)
