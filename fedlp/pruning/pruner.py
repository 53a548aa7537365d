"""Pruning one model: layer by layer on calibration data, each seen through what has been pruned before it.

While the layers are gone through, removed units are silenced (nothing reads them any more); at the end everything that
belongs to them is cut out at once, which gives the same outputs and a smaller dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fedlp.errors import AllocationError, CalibrationError
from fedlp.pruning import criteria
from fedlp.pruning.axes_decoder import is_language_model
from fedlp.pruning.calibration import StagedRun
from fedlp.pruning.groups import WidthSpec, cut_model
from fedlp.pruning.hessian import Moments, invert_hessian
from fedlp.pruning.obs import Elimination, Problem, eliminate, resolve_weight
from fedlp.pruning.slimgpt import group_schedule
from fedlp.pruning.units import input_columns, kept_columns, output_rows, weight_matrix, write_weight
from fedlp.types import Keep, PrunableLayer

Score = Literal["obs", "slimgpt", "magnitude", "wanda", "flap", "taylor", "random"]
MIN_DAMPING = 1e-6  # where none is asked for: against rounding only


@dataclass(frozen=True, slots=True)
class Method:
    """How units are chosen, and how the other weights make up for them.

    Attributes
    ----------
    score : str
        What units are chosen by: "obs" (exact greedy), "slimgpt" (its schedule and scores), or one of ``criteria``.
    recovery : "none", "bias" or "least_squares"
        Whether readers keep their weights, keep them and add the removed inputs' means to their bias, or are solved
        for anew on what is kept.
    centred : bool
        least_squares: fit with a bias, in which the means of removed inputs go.
    correction : float
        least_squares: how far the fit aims at the outputs of the dense model, in [0, 1]; 0 at those of the same
        weights on the inputs of the pruned one. For a language model's blocks the aim includes what the residual stream
        has drifted.
    fisher : bool
        Weigh errors of outputs by their Fisher information.
    damping : float or None
        Added to the Hessian, as a fraction of its mean diagonal entry; None for as little as rounding asks for, which
        needs as many calibration vectors as a layer has inputs.
    keeps_batch_norm : bool
        Leave the variances of batch norms as they are, and take what recovery adds to a bias off their means; else
        estimate both anew at the end. What is fitted to the dense model's outputs varies less than they do, and
        normalising it anew would blow it up.
    """

    score: Score = "obs"
    recovery: Literal["none", "bias", "least_squares"] = "least_squares"
    centred: bool = True
    correction: float = 0.0
    fisher: bool = False
    damping: float | None = None
    keeps_batch_norm: bool = False


@dataclass(frozen=True, slots=True)
class Calibration:
    """What pruning may look at: prepared inputs by batch, the flat labels of each, and a seed for what is drawn."""

    batches: Sequence[Tensor]
    labels: Sequence[Tensor]
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What became of one layer; ``loss`` is in units of its (weighed) squared output error, nan where not measured."""

    name: str
    num_units: int
    kept_units: int
    loss: float


@dataclass(frozen=True)
class Pruned:
    """A pruned model and how it came about; ``widths`` are in units of the model that went in."""

    model: nn.Module
    widths: Mapping[str, Keep]
    layers: tuple[LayerReport, ...]


@dataclass
class _Reader:
    """One layer that reads the units: its module, weights and statistics."""

    path: str
    module: nn.Module
    weight: Tensor
    moments: Moments
    unit_size: int
    inverse: Tensor | None = None
    gram: Tensor | None = field(default=None, repr=False)


class Pruner:
    """Prunes one model with one method.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode; not touched.
    spec : WidthSpec
        Its width axes.
    layers : sequence of PrunableLayer
        Those that units are removed from, in the order of the model.
    """

    def __init__(
        self, model: nn.Module, spec: WidthSpec, layers: Sequence[PrunableLayer], data: Calibration, method: Method
    ) -> None:
        self.spec, self.layers, self.data, self.method = spec, layers, data, method
        self.model = cut_model(model, spec, {}).eval()  # a copy
        paths = [path for layer in layers for path in layer.readers]
        rng = torch.Generator().manual_seed(data.seed)
        self._fisher: Mapping[str, Tensor] = {}
        if method.fisher:
            logits_only = not is_language_model(self.model)
            self._fisher = criteria.output_fisher(self.model, paths, data.batches, rng, logits_only)
        needs_gradients = method.score == "taylor"
        self._gradients = criteria.loss_gradients(self.model, data.batches, data.labels) if needs_gradients else {}
        self._rng = torch.Generator().manual_seed(data.seed)
        config = getattr(
            self.model, "config", None
        )  # blocks that add to a stream, and not those that then normalise it
        self._streams = is_language_model(self.model) and getattr(config, "do_layer_norm_before", True)
        self._norms = _following_batch_norms(self.model, data.batches[0])

    def num_added_params(self) -> int:
        """Return how many parameters pruning adds: the biases that readers get."""
        if self.method.recovery == "none" or (self.method.recovery == "least_squares" and not self.method.centred):
            return 0
        modules = {path: self.model.get_submodule(path) for layer in self.layers for path in layer.readers}
        return sum(
            len(weight_matrix(module))
            for path, module in modules.items()
            if path not in self._norms and getattr(module, "bias", None) is None
        )

    # ----------------------------------------------------------------------------------------------------------- dense
    def measure(self) -> dict[str, Elimination]:
        """Return each layer's whole order of removal and its losses, on the dense model's inputs."""
        run = StagedRun(self.model, self.data.batches)
        found = {}
        for layer in self.layers:
            self._reach(layer, run)
            readers = self._collect(layer, run, None)
            found[layer.name] = self._eliminate(layer, readers, layer.num_units - 1)
        return found

    def scores(self) -> dict[str, Tensor]:
        """Return each layer's unit scores by the method's criterion (not "obs", "slimgpt"), on the dense inputs."""
        run = StagedRun(self.model, self.data.batches)
        found = {}
        for layer in self.layers:
            self._reach(layer, run)
            found[layer.name] = self._scores(layer, self._collect(layer, run, None))
        return found

    # ----------------------------------------------------------------------------------------------------------- prune
    def prune(self, kept: Mapping[str, int], progress: Callable[[LayerReport], None] = lambda _: None) -> Pruned:
        """Return the model with ``kept`` units of each layer.

        Parameters
        ----------
        kept : mapping from layer name to int
            Units that stay, in [1, num_units].
        progress : callable
            Is told of each layer when it is done.
        """
        for layer in self.layers:
            if not 1 <= kept[layer.name] <= layer.num_units:
                raise AllocationError(f"layer {layer.name}: cannot keep {kept[layer.name]} of {layer.num_units} units")
        run = StagedRun(self.model, self.data.batches)
        corrects = self.method.recovery == "least_squares" and self.method.correction > 0
        dense = StagedRun(cut_model(self.model, self.spec, {}), self.data.batches) if corrects else None
        widths: dict[str, Keep] = {}
        reports = []
        for layer in self.layers:
            self._reach(layer, run, dense)
            keep, loss = self._prune_layer(layer, run, dense, kept[layer.name])
            widths[layer.name] = Keep.from_indices(keep.numpy(), layer.num_units)
            reports.append(LayerReport(layer.name, layer.num_units, len(keep), loss))
            progress(reports[-1])
        model = cut_model(self.model, self.spec, widths)
        if not self.method.keeps_batch_norm:
            reestimate_batch_norms(model, self.data.batches)
        return Pruned(model.eval(), widths, tuple(reports))

    def _reach(self, layer: PrunableLayer, run: StagedRun, dense: StagedRun | None = None) -> None:
        while run.current < run.stage_of(layer.readers[0]):
            run.advance()
            if dense is not None:
                dense.advance()

    def _prune_layer(
        self, layer: PrunableLayer, run: StagedRun, dense: StagedRun | None, kept: int
    ) -> tuple[Tensor, float]:
        everything = torch.arange(layer.num_units)
        if kept == layer.num_units and dense is None:
            return everything, 0.0
        readers = self._collect(layer, run, dense)
        keep, loss = everything, 0.0
        if kept < layer.num_units:
            removed, loss = self._choose(layer, readers, layer.num_units - kept)
            keep = everything[~torch.isin(everything, removed)]
        gone = everything[~torch.isin(everything, keep)]
        for reader in readers:
            self._rewrite(reader, keep, gone)
        return keep, loss

    def _choose(self, layer: PrunableLayer, readers: list[_Reader], count: int) -> tuple[Tensor, float]:
        """Return the units to remove and the loss of that."""
        if self.method.score in ("obs", "slimgpt"):
            found = self._eliminate(layer, readers, count)
            return torch.tensor(found.order), found.losses[-1]
        scores = self._scores(layer, readers)
        return torch.sort(scores, stable=True).indices[:count], float("nan")

    # -------------------------------------------------------------------------------------------------------- one layer
    def _collect(self, layer: PrunableLayer, run: StagedRun, dense: StagedRun | None) -> list[_Reader]:
        """Return the layer's readers with the statistics of their inputs."""
        modules = [self.model.get_submodule(path) for path in layer.readers]
        twins = [] if dense is None else self._twins(layer, run, dense)
        readers = []
        for path, module in zip(layer.readers, modules, strict=True):
            weight = weight_matrix(module).to(torch.float64)
            moments = Moments.empty(weight.shape[1], 0 if dense is None else weight.shape[0])
            readers.append(_Reader(path, module, weight, moments, weight.shape[1] // layer.num_units))
        earlier = self._earlier(layer, run) if dense is not None else []
        for batch in range(len(self.data.batches)):
            seen = run.observe(batch, [*earlier, *modules])
            aims: list[Tensor | None] = [None] * len(readers)
            if dense is not None:
                aims = self._aims(run, dense, batch, seen[: len(earlier)], twins, readers)
            for reader, (inputs, _), aim in zip(readers, seen[len(earlier) :], aims, strict=True):
                columns = input_columns(reader.module, inputs)
                if not bool(torch.isfinite(columns).all()):
                    raise CalibrationError(
                        f"layer {layer.name}: inputs of {reader.path} are not finite on the calibration data; check "
                        "the model's weights and the data set"
                    )
                reader.moments.add(columns, aim)
        return readers

    def _twins(self, layer: PrunableLayer, run: StagedRun, dense: StagedRun) -> list[nn.Module]:
        stage, path = dense.stages[dense.current], run.paths[run.current]
        names = [*self._earlier_paths(layer, run), *layer.readers]
        return [stage.get_submodule(name.removeprefix(path)) for name in names]

    def _earlier_paths(self, layer: PrunableLayer, run: StagedRun) -> list[str]:
        """Return the readers of the same block that come before: what they write is in the residual stream."""
        if not self._streams:
            return []
        before = self.layers[: self.layers.index(layer)]
        return [path for other in before for path in other.readers if run.stage_of(path) == run.current]

    def _earlier(self, layer: PrunableLayer, run: StagedRun) -> list[nn.Module]:
        return [self.model.get_submodule(path) for path in self._earlier_paths(layer, run)]

    def _aims(
        self,
        run: StagedRun,
        dense: StagedRun,
        batch: int,
        earlier: list[tuple[Tensor, Tensor]],
        twins: list[nn.Module],
        readers: list[_Reader],
    ) -> list[Tensor | None]:
        """Return what each reader should write: the dense one's output and, in a block, what the stream lacks."""
        wanted = dense.observe(batch, twins)
        outputs = [output for _, output in wanted[len(earlier) :]]
        if self._streams:
            lacking = dense.input(batch) - run.input(batch)
            for (_, was), (_, output) in zip(earlier, wanted[: len(earlier)], strict=True):
                lacking = lacking + (output - was).reshape_as(lacking)
            outputs = [output + lacking.reshape_as(output) for output in outputs]
        return [output_rows(reader.module, output) for reader, output in zip(readers, outputs, strict=True)]

    def _solve(self, reader: _Reader) -> tuple[Tensor, Tensor]:
        """Return the best full-width weights for the reader's aim, and the inverse Hessian."""
        if reader.inverse is None:
            hessian = reader.moments.hessian(self.method.centred)
            damping = MIN_DAMPING if self.method.damping is None else self.method.damping
            if self.method.damping is None and reader.moments.count < len(hessian):
                damping = 0.0  # too few: let the factorisation say so
            reader.inverse = invert_hessian(hessian, damping, reader.path, reader.moments.count)
            if reader.moments.cross is not None:
                missed = reader.moments.target_hessian(self.method.centred) - reader.weight @ hessian
                reader.weight = reader.weight + self.method.correction * missed @ reader.inverse
        return reader.weight, reader.inverse

    def _eliminate(self, layer: PrunableLayer, readers: list[_Reader], count: int) -> Elimination:
        problems = []
        for reader in readers:
            weight, inverse = self._solve(reader)
            weighed = self._fisher[reader.path] @ weight if self._fisher else weight
            problems.append(Problem(weight.T @ weighed, inverse, reader.unit_size))
        if self.method.score == "slimgpt":
            schedule = [1] * count if layer.unit_size > 1 else group_schedule(count)
            return eliminate(problems, schedule, score="columns")
        return eliminate(problems, [1] * count)

    def _scores(self, layer: PrunableLayer, readers: list[_Reader]) -> Tensor:
        """Return the criterion's score of every unit."""
        match self.method.score:
            case "magnitude":
                return criteria.magnitude_scores(self.model, self.spec, layer)
            case "taylor":
                return criteria.taylor_scores(self.model, self.spec, layer, self._gradients)
            case "random":
                return torch.rand(layer.num_units, generator=self._rng, dtype=torch.float64)
            case name:
                score = criteria.wanda_scores if name == "wanda" else criteria.flap_scores
                parts = [score(reader.weight, reader.moments, reader.unit_size) for reader in readers]
                return torch.stack(parts).sum(dim=0)

    def _rewrite(self, reader: _Reader, keep: Tensor, gone: Tensor) -> None:
        """Give the reader its new weights: zero where units are gone."""
        kept, removed = kept_columns(keep, reader.unit_size), kept_columns(gone, reader.unit_size)
        moments, weight = reader.moments, torch.zeros_like(reader.weight)
        old_bias = getattr(reader.module, "bias", None)
        bias = torch.zeros(len(weight), dtype=weight.dtype) if old_bias is None else old_bias.detach().to(weight.dtype)
        shift: Tensor | None = None
        if self.method.recovery == "least_squares":
            dense_weight = reader.weight
            solved, inverse = self._solve(reader)
            weight[:, kept] = resolve_weight(solved, inverse, kept, removed)
            if self.method.centred:
                aim = dense_weight @ moments.mean + bias if moments.cross is None else moments.target_mean
                shift = aim - weight @ moments.mean
        else:
            weight[:, kept] = reader.weight[:, kept]
            if self.method.recovery == "bias":
                shift = bias + reader.weight[:, removed] @ moments.mean[removed]
        norm = self._norms.get(reader.path)
        if norm is not None and shift is not None and self.method.keeps_batch_norm:
            self.model.get_submodule(norm).running_mean.sub_(shift)  # type: ignore[operator]
        write_weight(reader.module, weight, None if norm is not None else shift)


def reestimate_batch_norms(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Set the running statistics of all batch norms to the averages over these batches, in place."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def _following_batch_norms(model: nn.Module, batch: Tensor) -> dict[str, str]:
    """Return the batch norm that reads the outputs of a convolution or linear layer, by the path of the latter."""
    if is_language_model(model):
        return {}
    written: dict[int, str] = {}
    found: dict[str, str] = {}
    outputs = []  # kept alive, so that their ids stay theirs
    with ExitStack() as stack:
        for path, module in model.named_modules():

            def look(_: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
                found[written.get(id(inputs[0]), "")] = path

            def note(_: nn.Module, __: object, output: Tensor, path: str = path) -> None:
                outputs.append(output)
                written[id(output)] = path

            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                stack.callback(module.register_forward_pre_hook(look).remove)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                stack.callback(module.register_forward_hook(note).remove)
        model(batch[:1])
    return found
