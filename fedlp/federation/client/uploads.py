"""Upload of a client after training: unit selection, encoding, residual for the next round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedlp.data.datasets import DataInfo, Examples
from fedlp.federation.client.error_feedback import Keeps, add_residual, keep_residual
from fedlp.federation.client.input_norms import measure_input_norms
from fedlp.federation.client.settings import ClientSettings
from fedlp.federation.client.unit_choice import best_units, score_units
from fedlp.federation.costs import Costs
from fedlp.federation.submodels import SubModelLayout, SubModels
from fedlp.federation.wire.encodings.base import is_plain
from fedlp.models import state_tensors
from fedlp.models.adapter_ranks import tail_norm
from fedlp.models.adapters import has_adapters, merge_adapters
from fedlp.pruning.pruner import Calibration, Pruner
from fedlp.pruning.reader_layers import Method
from fedlp.pruning.scores.evidence import COARSE, FINE
from fedlp.pruning.scores.magnitude import Magnitude
from fedlp.pruning.tracing.units import is_reader
from fedlp.pruning.tracing.widths import WidthSpec, cut_model, slice_tensor, tensor_keeps
from fedlp.rng import Stream, generator, torch_seed
from fedlp.training.calibration_data import batch_calibration, whole_examples
from fedlp.training.loop import Penalty
from fedlp.types import Assignment, InputNorms, Keep, PrunableLayer, TrainInstruction

MIN_SCORED = 2  # examples without which a client does not score


@dataclass(frozen=True)
class Upload:
    """One upload, with the residual that stays on the client.

    Attributes
    ----------
    params : mapping from name to Tensor
        Encoded.
    widths : mapping from axis name to Keep
        Units selected by the client on request, of the global model.
    scores : mapping from axis name to (units,)
    input_norms : mapping from module path to InputNorms
    residual : mapping from name to Tensor
        Part of the update that was not sent, in global shapes; empty without error feedback.
    macs : float
        MACs of unit selection.
    """

    params: Mapping[str, Tensor]
    widths: Mapping[str, Keep]
    scores: Mapping[str, Tensor]
    input_norms: Mapping[str, InputNorms]
    residual: Mapping[str, Tensor]
    macs: float


class Uploads:
    """Factory of the uploads of all clients of one run."""

    def __init__(self, settings: ClientSettings, info: DataInfo, submodels: SubModels) -> None:
        self._settings, self._info, self._submodels = settings, info, submodels
        self._encoding, self._options, self._costs = settings.encoding, settings.options, Costs(submodels)

    def is_plain(self, assigned: Assignment) -> bool:
        """Return whether uploads are exactly the trained weights."""
        asks = assigned.kept or assigned.returned or assigned.evidence
        return not asks and not self._settings.sends_deltas and is_plain(self._encoding)

    def gradient_masks(self, instruction: TrainInstruction, model: nn.Module) -> dict[str, Tensor]:
        """Return 1 for entries that will be sent and 0 for others, if only these are trained."""
        if not (self._options.train_sent and instruction.returned):
            return {}
        spec, local = self._spec(instruction), self._returned(instruction)
        masks = {}
        for name, parameter in model.named_parameters():
            if name in instruction.uploads:
                masks[name] = _mask(tensor_keeps(spec, name, parameter.shape, local)).to(parameter)
            else:
                masks[name] = torch.zeros_like(parameter)
        return masks

    def penalty(self, instruction: TrainInstruction) -> Penalty | None:
        """Return the penalty on ranks that the client may cut; None without any."""
        weight, starts = self._settings.rank_penalty, list(instruction.least.values())
        if not (starts and weight):
            return None
        return lambda model: weight * tail_norm(dict(model.named_parameters()), starts[0])

    def _spec(self, instruction: TrainInstruction) -> WidthSpec:
        """Return the axes of a client's sub-model."""
        if not (instruction.kept or instruction.returned or instruction.evidence):
            return WidthSpec({}, {})
        held, whole = instruction.submodel.widths, self._submodels.widths
        counts = {axis: held[axis].count if axis in held else size for axis, size in whole.axes.items()}
        return WidthSpec(counts, whole.dims)

    @staticmethod
    def _returned(instruction: TrainInstruction) -> dict[str, Keep]:
        """Return the units selected by the server, as positions in the client's sub-model."""
        held = instruction.submodel.widths
        return {axis: keep.within(held.get(axis, Keep.full(keep.size))) for axis, keep in instruction.returned.items()}

    def make(
        self, instruction: TrainInstruction, model: nn.Module, examples: Examples, residual: Mapping[str, Tensor]
    ) -> Upload:
        """Return a client's upload.

        Parameters
        ----------
        model : nn.Module
            The trained sub-model; not changed.
        examples : Examples
            The client's.
        residual : mapping from name to Tensor
            Residual of the client's earlier uploads, in global shapes; may be empty.
        """
        layout = self._submodels.layout(instruction.submodel)
        received = layout.name_set & instruction.params.keys()  # frozen tensors that stay encoded are not among them
        if not _asks_units(instruction):
            received -= self._submodels.spec.frozen  # whose differences are zero, and as large as the model
        trained = {name: tensor for name, tensor in state_tensors(model).items() if name in received}
        updates = _differences(trained, instruction.params)
        if self._settings.error_feedback:
            updates = add_residual(updates, residual, layout.keeps)
        spec = self._spec(instruction)
        if instruction.least:
            scores, chosen, macs = dict[str, Tensor](), self._cut(instruction, trained), 0.0
        else:
            scores, chosen, macs = self._choose(instruction, model, updates, spec, examples)
        local = self._returned(instruction) | chosen
        if chosen and self._options.compensate and len(whole_examples(examples, self._info)) >= MIN_SCORED:
            trained |= self._compensate(instruction, model, local, spec, examples)
            updates = _differences(trained, instruction.params)
        names = [name for name in layout.names if name in instruction.uploads]
        keeps = {name: tensor_keeps(spec, name, trained[name].shape, local) for name in names}
        source = trained if not self._settings.sends_deltas else trained | updates
        values = {name: slice_tensor(source[name], kept) for name, kept in keeps.items()}
        encoded = self._encode(instruction, values)
        left = self._keep_residual(layout, updates, values, keeps, encoded, residual)
        norms, norms_macs = self._measure_input_norms(instruction, model, examples)
        return Upload(encoded, _global_units(instruction, chosen), scores, norms, left, macs + norms_macs)

    @staticmethod
    def _cut(instruction: TrainInstruction, trained: Mapping[str, Tensor]) -> dict[str, Keep]:
        """Return the ranks of adapters that are left: without the tail, where its norm fell."""
        found = {}
        for axis, count in instruction.kept.items():
            start = instruction.least[axis]
            fell = float(tail_norm(trained, start)) < float(tail_norm(instruction.params, start))
            found[axis] = Keep.first(start if fell else count, count)
        return found

    def _encode(self, instruction: TrainInstruction, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return encoded values."""
        seed = torch_seed(self._settings.seed, Stream.ENCODING, instruction.server_round, instruction.client_id)
        return self._encoding.encode(values, torch.Generator().manual_seed(seed))

    def _keep_residual(
        self,
        layout: SubModelLayout,
        updates: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        keeps: Keeps,
        encoded: Mapping[str, Tensor],
        residual: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the residual of the trainable tensors after an upload; empty without error feedback."""
        if not self._settings.error_feedback:
            return {}
        signature = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in values.items()]
        sent, tensors = self._encoding.decode(encoded, signature, ""), self._submodels.spec.tensors
        trainable = {name: updates[name] for name in layout.names if tensors[name].trainable}
        shapes = {name: tensors[name].shape for name in trainable}
        return keep_residual(trainable, sent, keeps, residual, layout.keeps, shapes)

    def _measure_input_norms(
        self, instruction: TrainInstruction, model: nn.Module, examples: Examples
    ) -> tuple[dict[str, InputNorms], float]:
        """Return the requested input norms, and their compute cost in MACs."""
        if "input_norms" not in instruction.evidence:
            return {}, 0.0
        data = self._calibration(instruction, examples)
        if not data.num_examples:
            return {}, 0.0
        present = [path for path in self._submodels.reader_columns if is_reader(model.get_submodule(path))]
        norms = measure_input_norms(model, present, data.batches)
        return norms, self._costs.macs(instruction.submodel).forward * data.num_examples

    def _choose(
        self,
        instruction: TrainInstruction,
        model: nn.Module,
        updates: Mapping[str, Tensor],
        spec: WidthSpec,
        examples: Examples,
    ) -> tuple[dict[str, Tensor], dict[str, Keep], float]:
        """Return the requested scores, the selected units of the sub-model, and their compute cost in MACs.

        A client of fewer than two examples chooses by magnitude and sends no scores: one input has no variance.
        """
        if not _asks_units(instruction):
            return {}, {}, 0.0
        if has_adapters(model):
            model = merge_adapters(cut_model(model, spec, {}))
        scored = _with_values(model, spec, updates) if self._options.criterion == "update" else model
        data, per_example = self._calibration(instruction, examples), self._costs.macs(instruction.submodel)
        method = self._method
        is_scored = data.num_examples >= MIN_SCORED or method.score.needs <= {"weights"}
        if not is_scored:
            method = replace(method, score=Magnitude())
        precision = COARSE if self._options.scores == "coarse" else FINE
        scores, macs = score_units(model, scored, spec, self._layers(spec), data, method, per_example, precision)
        chosen = {axis: best_units(scores[axis], count) for axis, count in instruction.kept.items()}
        return scores if "unit_scores" in instruction.evidence and is_scored else {}, chosen, macs

    def _compensate(
        self,
        instruction: TrainInstruction,
        model: nn.Module,
        local: Mapping[str, Keep],
        spec: WidthSpec,
        data: Examples,
    ) -> dict[str, Tensor]:
        """Return the trained tensors; those of readers compensate for the units that are not sent."""
        layers = self._layers(spec)
        method = replace(self._method, centred=False, keeps_batch_norm=True)
        pruner = Pruner(model, spec, layers, self._calibration(instruction, data), method)
        refitted = state_tensors(pruner.refit({axis: torch.from_numpy(keep.indices()) for axis, keep in local.items()}))
        return {name: tensor for name, tensor in refitted.items() if name in instruction.uploads}

    def _layers(self, spec: WidthSpec) -> list[PrunableLayer]:
        """Return the prunable layers of a client's sub-model."""
        found = [replace(layer, num_units=spec.axes[layer.name]) for layer in self._submodels.layers]
        return [layer for layer in found if layer.num_units]

    def _calibration(self, instruction: TrainInstruction, examples: Examples) -> Calibration:
        wanted, key = self._settings.calibration, (instruction.server_round, instruction.client_id)
        whole = whole_examples(examples, self._info)
        rng = generator(self._settings.seed, Stream.CALIBRATION, *key)
        chosen = whole.select(rng.permutation(len(whole))[: wanted.examples])
        seed = torch_seed(self._settings.seed, Stream.UNITS, *key)
        return batch_calibration(chosen, self._info, wanted.batch_size, seed, torch.device(self._settings.device))

    @property
    def _method(self) -> Method:
        return replace(self._settings.method, correction=0.0)


def _asks_units(instruction: TrainInstruction) -> bool:
    """Return whether a client scores its units, or chooses among them."""
    return bool(instruction.kept) or "unit_scores" in instruction.evidence


def _differences(trained: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return trained less received values of all floating-point tensors."""
    floats = {name: tensor for name, tensor in trained.items() if tensor.is_floating_point()}
    return {name: tensor - received[name].to(tensor.device) for name, tensor in floats.items()}


def _with_values(model: nn.Module, spec: WidthSpec, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model with other values."""
    copied = cut_model(model, spec, {})
    for name, tensor in state_tensors(copied).items():
        if name in values:
            tensor.copy_(values[name])
    return copied


def _global_units(instruction: TrainInstruction, chosen: Mapping[str, Keep]) -> dict[str, Keep]:
    """Return units of the client's sub-model as units of the global model."""
    held = instruction.submodel.widths
    outer = {axis: held.get(axis, Keep.full(keep.size)) for axis, keep in chosen.items()}
    return {
        axis: Keep.from_indices(outer[axis].indices()[keep.indices()], outer[axis].size)
        for axis, keep in chosen.items()
    }


def _mask(keeps: tuple[Keep, ...]) -> Tensor:
    """Return 1 for the kept entries of a tensor, 0 for the others."""
    mask = torch.ones(())
    for keep in keeps:
        row = torch.zeros(keep.size)
        row[torch.from_numpy(keep.indices())] = 1.0
        mask = mask[..., None] * row
    return mask
