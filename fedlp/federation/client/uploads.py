"""What a client sends after training: units chosen, values encoded, and the rest kept for the next time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fedlp.data.datasets import DataInfo, Examples
from fedlp.federation.client.input_norms import measure_input_norms
from fedlp.federation.client.settings import ClientSettings
from fedlp.federation.client.unit_choice import best_units, score_units
from fedlp.federation.costs import Costs
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.encodings.base import is_plain
from fedlp.models import state_tensors
from fedlp.pruning.kernels.sampled_rows import DAMPING
from fedlp.pruning.pruner import Calibration, Pruner
from fedlp.pruning.reader_layers import Method
from fedlp.pruning.tracing.widths import WidthSpec, cut_model, slice_tensor, tensor_keeps
from fedlp.rng import Stream, generator, torch_seed
from fedlp.training.calibration_data import batch_calibration, whole_examples
from fedlp.types import Assignment, InputNorms, Keep, PrunableLayer, TrainInstruction


@dataclass(frozen=True)
class Upload:
    """What travels, and what stays.

    Attributes
    ----------
    params : mapping from name to Tensor
        Encoded.
    widths : mapping from axis name to Keep
        The units that the client was asked to choose.
    scores : mapping from axis name to (units,)
    input_norms : mapping from module path to InputNorms
    residual : mapping from name to Tensor
        What was not sent of the differences, in global shapes; empty without error feedback.
    macs : float
        Spent on choosing units.
    """

    params: Mapping[str, Tensor]
    widths: Mapping[str, Keep]
    scores: Mapping[str, Tensor]
    input_norms: Mapping[str, InputNorms]
    residual: Mapping[str, Tensor]
    macs: float


class Uploads:
    """Makes the uploads of all clients of one run."""

    def __init__(self, settings: ClientSettings, info: DataInfo, submodels: SubModels) -> None:
        self._settings, self._info, self._submodels = settings, info, submodels
        self._encoding, self._options, self._costs = settings.encoding, settings.options, Costs(submodels)

    def is_plain(self, assigned: Assignment) -> bool:
        """Return whether trained weights travel as they are, and nothing else."""
        asks = assigned.kept or assigned.returned or assigned.evidence
        return not asks and not self._settings.sends_deltas and is_plain(self._encoding)

    def gradient_masks(self, instruction: TrainInstruction, model: nn.Module) -> dict[str, Tensor]:
        """Return 1 for entries that the server will have back and 0 for others, where only those are to be trained."""
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

    def _spec(self, instruction: TrainInstruction) -> WidthSpec:
        """Return the axes of a client's sub-model."""
        if not (instruction.kept or instruction.returned or instruction.evidence):
            return WidthSpec({}, {})
        held, whole = instruction.submodel.widths, self._submodels.widths
        counts = {axis: held[axis].count if axis in held else size for axis, size in whole.axes.items()}
        return WidthSpec(counts, whole.dims)

    @staticmethod
    def _returned(instruction: TrainInstruction) -> dict[str, Keep]:
        """Return the units that the server has chosen, as positions in the client's sub-model."""
        held = instruction.submodel.widths
        return {axis: keep.within(held.get(axis, Keep.full(keep.size))) for axis, keep in instruction.returned.items()}

    def make(
        self, instruction: TrainInstruction, model: nn.Module, examples: Examples, residual: Mapping[str, Tensor]
    ) -> Upload:
        """Return what a client sends.

        Parameters
        ----------
        model : nn.Module
            The trained sub-model; not changed.
        examples : Examples
            The client's.
        residual : mapping from name to Tensor
            What it could not send before, in global shapes; may be empty.
        """
        held = instruction.submodel.widths
        layout = self._submodels.layout(instruction.submodel)
        trained = {name: tensor for name, tensor in state_tensors(model).items() if name in layout.name_set}
        received = {name: tensor.to(trained[name].device) for name, tensor in instruction.params.items()}
        tracked = [name for name in layout.names if self._submodels.spec.tensors[name].trainable]
        updates = {name: trained[name] - received[name] for name in trained if trained[name].is_floating_point()}
        if self._settings.error_feedback and residual:
            for name in tracked:
                keeps = layout.keeps.get(name)
                left = residual[name] if keeps is None else slice_tensor(residual[name], keeps)
                updates[name] = updates[name] + left.to(updates[name])
        spec = self._spec(instruction)
        scores, chosen, macs = self._choose(instruction, model, updates, spec, examples)
        local = self._returned(instruction) | chosen
        if chosen and self._options.compensate:
            trained |= self._compensate(instruction, model, local, spec, examples)
            updates |= {name: trained[name] - received[name] for name in updates}
        sent_names = [name for name in layout.names if name in instruction.uploads]
        keeps_of = {name: tensor_keeps(spec, name, trained[name].shape, local) for name in sent_names}
        source = trained if not self._settings.sends_deltas else {**trained, **updates}
        values = {name: slice_tensor(source[name], keeps_of[name]) for name in sent_names}
        seed = torch_seed(self._settings.seed, Stream.ENCODING, instruction.server_round, instruction.client_id)
        encoded = self._encoding.encode(values, torch.Generator().manual_seed(seed))
        kept_back: dict[str, Tensor] = {}
        if self._settings.error_feedback:
            signature = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in values.items()]
            sent = self._encoding.decode(encoded, signature, "")
            for name in tracked:
                left = updates[name].clone()
                if name in sent:
                    index = _index(keeps_of[name])
                    left[index] -= sent[name].to(left)
                shape = self._submodels.spec.tensors[name].shape
                whole = residual[name].clone() if name in residual else torch.zeros(shape, dtype=left.dtype)
                keeps = layout.keeps.get(name) or tuple(Keep.full(size) for size in shape)
                whole[_index(keeps)] = left.cpu()
                kept_back[name] = whole
        widths = {axis: _globally(keep, held.get(axis, Keep.full(keep.size))) for axis, keep in chosen.items()}
        norms: dict[str, InputNorms] = {}
        if "input_norms" in instruction.evidence:
            calibration = self._calibration(instruction, examples)
            norms = measure_input_norms(model, list(self._submodels.reader_columns), calibration.batches)
            macs += self._costs.macs(instruction.submodel).forward * sum(map(len, calibration.batches))
        return Upload(encoded, widths, scores, norms, kept_back, macs)

    def _choose(
        self,
        instruction: TrainInstruction,
        model: nn.Module,
        updates: Mapping[str, Tensor],
        spec: WidthSpec,
        examples: Examples,
    ) -> tuple[dict[str, Tensor], dict[str, Keep], float]:
        """Return the scores that were asked for, the units chosen among those of the sub-model, and their price."""
        if not (instruction.kept or "unit_scores" in instruction.evidence):
            return {}, {}, 0.0
        layers = self._layers(spec)
        method = self._method
        scored = model
        if self._options.criterion == "update":
            scored = cut_model(model, spec, {})
            for name, tensor in state_tensors(scored).items():
                if name in updates:
                    tensor.copy_(updates[name])
        per_example = self._costs.macs(instruction.submodel)
        scores, macs = score_units(
            model, scored, spec, layers, self._calibration(instruction, examples), method, per_example
        )
        chosen = {axis: best_units(scores[axis], count) for axis, count in instruction.kept.items()}
        return scores if "unit_scores" in instruction.evidence else {}, chosen, macs

    def _compensate(
        self,
        instruction: TrainInstruction,
        model: nn.Module,
        local: Mapping[str, Keep],
        spec: WidthSpec,
        data: Examples,
    ) -> dict[str, Tensor]:
        """Return the trained tensors, those of readers made up for the units that are not sent."""
        layers = self._layers(spec)
        method = replace(self._method, centred=False, keeps_batch_norm=True)
        pruner = Pruner(model, spec, layers, self._calibration(instruction, data), method)
        refitted = state_tensors(pruner.refit({axis: torch.from_numpy(keep.indices()) for axis, keep in local.items()}))
        return {name: tensor for name, tensor in refitted.items() if name in instruction.uploads}

    def _layers(self, spec: WidthSpec) -> list[PrunableLayer]:
        """Return the prunable layers of a client's sub-model."""
        return [replace(layer, num_units=spec.axes[layer.name]) for layer in self._submodels.layers]

    def _calibration(self, instruction: TrainInstruction, examples: Examples) -> Calibration:
        wanted, key = self._settings.calibration, (instruction.server_round, instruction.client_id)
        whole = whole_examples(examples, self._info)
        rng = generator(self._settings.seed, Stream.CALIBRATION, *key)
        chosen = whole.select(rng.permutation(len(whole))[: wanted.examples])
        seed = torch_seed(self._settings.seed, Stream.UNITS, *key)
        return batch_calibration(chosen, self._info, wanted.batch_size, seed, torch.device(self._settings.device))

    @property
    def _method(self) -> Method:
        method = self._settings.method
        return replace(method, correction=0.0, damping=DAMPING if method.damping is None else method.damping)


def _globally(keep: Keep, outer: Keep) -> Keep:
    """Return positions among the units of ``outer`` as indices of the global axis."""
    return Keep.from_indices(outer.indices()[keep.indices()], outer.size)


def _index(keeps: tuple[Keep, ...]) -> tuple[Tensor, ...]:
    """Return what picks the kept entries of a tensor, for reading and for writing."""
    return tuple(torch.from_numpy(part) for part in np.ix_(*(keep.indices() for keep in keeps)))


def _mask(keeps: tuple[Keep, ...]) -> Tensor:
    """Return 1 for the kept entries of a tensor, 0 for the others."""
    mask = torch.ones(())
    for keep in keeps:
        row = torch.zeros(keep.size)
        row[torch.from_numpy(keep.indices())] = 1.0
        mask = mask[..., None] * row
    return mask
