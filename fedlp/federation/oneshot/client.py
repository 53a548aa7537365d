"""Client side of federated one-shot pruning: sums over its own examples, through the model pruned so far.

Any process can answer any request: changes of the model so far lie on the client's disk, and are checked by the
digest of the resulting state. A repeated request continues from the cached state.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import RecordDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlp.data.datasets import DataInfo
from fedlp.data.examples import Examples
from fedlp.errors import DataError, ProtocolError, one_line
from fedlp.federation.oneshot import messages
from fedlp.federation.oneshot.calibration import ClientExamples
from fedlp.federation.oneshot.judging import PlanJudge
from fedlp.federation.oneshot.messages import Part, Request
from fedlp.federation.oneshot.model import (
    ModelStates,
    count_positions,
    digest_state,
    fisher_parts,
    moment_parts,
    moment_sums,
    norm_parts,
    norm_statistics,
    split_reference,
)
from fedlp.federation.oneshot.settings import OneShotSettings
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.packing import Signature
from fedlp.federation.wire.record_access import read_tensors
from fedlp.models import state_tensors
from fedlp.models.adapters import merge_adapters
from fedlp.pruning.batch_norms import following_batch_norms, reestimate_batch_norms
from fedlp.pruning.calibration import Calibration, choose_half
from fedlp.pruning.gradients import fisher_sums
from fedlp.pruning.layer_statistics import Collector
from fedlp.pruning.pruner import Pruner
from fedlp.pruning.tracing.decoder import is_language_model
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import cut_model
from fedlp.types import Keep, SubModel

log = logging.getLogger("fedlp")

_FILES = "layer-[0-9]*.safetensors"
_MODEL = "model.safetensors"


class PoolingClient:
    """Responder of a client process, for any client.

    Parameters
    ----------
    examples_of : callable
        Returns the training examples of a client.
    """

    def __init__(
        self, settings: OneShotSettings, info: DataInfo, submodels: SubModels, examples_of: Callable[[int], Examples]
    ) -> None:
        self._settings = settings
        self._spec = submodels.widths
        self._device = torch.device(settings.device)
        self._initial = cut_model(submodels.spec.build(settings.seed), self._spec, {}).eval().to(self._device)
        self._signature_of_all = submodels.layout(SubModel()).signature()
        shared = settings.shared and not submodels.spec.reads_tokens
        self._layers = find_layers(self._initial, self._spec, shared)
        self._example = submodels.spec.example_inputs(1).to(self._device)
        self._norms = following_batch_norms(self._initial, self._example)
        self._method = settings.method
        self._dtype = settings.dtype
        self._examples = ClientExamples(settings, info, examples_of, self._device, self._forget)
        self._collectors: dict[tuple[int, int], tuple[int, Collector]] = {}  # by client and half
        self._states = self._first_state()
        self._made: PlanJudge | None = None

    def calibration(self, client_id: int) -> Calibration:
        """Return a client's calibration data, the same every time."""
        return self._examples.of(client_id)

    def _judge(self, content: RecordDict, folder: Path) -> PlanJudge:
        """Return the judge of a search's plans, against the model of the request as far as it is at hand."""
        if self._made is None:
            self._made = self._make_judge()
        if messages.base_of(content) != self._made.name and self._start_from(folder / _MODEL):
            self._made = self._make_judge()
        return self._made

    def _make_judge(self) -> PlanJudge:
        labels = count_positions(self._initial, self._layers, self._example)[1]
        name = digest_state(b"", state_tensors(self._initial))
        of_model = self._initial, name, self._spec, self._layers, self._norms
        return PlanJudge(self._settings, *of_model, labels, self._examples.batches)

    def _forget(self, client_id: int) -> None:
        for half in range(3):
            self._collectors.pop((client_id, half), None)

    def take_model(self, content: RecordDict, folder: Path) -> RecordDict:
        """Keep the model that the server sends, from which the next questions start; return the records that say so."""
        tensors = read_tensors(content, messages.PARAMS, self._signature_of_all)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"model.{os.getpid()}.partial"
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, partial)
        partial.replace(folder / _MODEL)
        return messages.encode_taken()

    def answer(self, kind: str, content: RecordDict, client_id: int, folder: Path) -> RecordDict:
        """Return the records that answer a request.

        Parameters
        ----------
        kind : str
            The message's type.
        folder : Path
            Folder of the model's changes so far.
        """
        if kind == messages.JUDGE:
            return self._judge(content, folder).answer(content, client_id, folder)
        request = self._decode(kind, content)
        if not self._reach(request, folder):
            return messages.encode_lack()
        data = self._data(request, client_id)
        if kind == messages.VOTE:
            return messages.encode_vote(self._vote(request, data), tuple(self._spec.axes), data.num_examples)
        parts, sums = self._sums(request, client_id, data)
        return messages.encode_sums(sums, parts, request.question.layer, data.num_examples, self._dtype)

    def measure(
        self, kind: str, content: RecordDict, client_id: int, folder: Path
    ) -> tuple[list[Part], Mapping[str, Tensor], int]:
        """Return the parts of the sums that a request asks for, the sums, and of how many examples they are.

        Sums of batch norm statistics count batches: their examples are rounded up to whole ones.

        Raises
        ------
        DataError
            If the client lacks the state that the request starts from.
        """
        if kind == messages.JUDGE:
            return self._judge(content, folder).measure(content, client_id, folder)
        request = self._decode(kind, content)
        if not self._reach(request, folder):
            raise DataError(f"client {client_id} has lost the model pruned so far; it needs all changes again")
        data = self._data(request, client_id)
        if kind == messages.VOTE:
            parts = messages.vote_parts(request.question.kept, self._spec.axes)
            return parts, messages.ballots(self._vote(request, data)), data.num_examples
        size = self._settings.batch_size if kind == messages.NORMS else 1
        return *self._sums(request, client_id, data), -(-data.num_examples // size) * size

    def _vote(self, request: Request, data: Calibration) -> Mapping[str, Keep]:
        """Return the units that the client keeps, pruning alone."""
        pruner = Pruner(self._initial, self._spec, self._layers, data, self._method)
        return pruner.prune(request.question.kept).widths

    def _decode(self, kind: str, content: RecordDict) -> Request:
        return messages.decode_request(content, kind, tuple(self._spec.axes), self._signature)

    def _data(self, request: Request, client_id: int) -> Calibration:
        """Return the calibration data that a request is about."""
        half = request.question.half
        return self._half(client_id, half) if half else self.calibration(client_id)

    # ---- sums
    def _sums(self, request: Request, client_id: int, data: Calibration) -> tuple[list[Part], Mapping[str, Tensor]]:
        model = self._states.model
        match request.question.kind:
            case messages.MOMENTS:
                number = request.question.layer
                collector, layer = self._collector(client_id, request.question.half, data, number), self._layers[number]
                reference = request.question.reference
                if reference is None:
                    raise ProtocolError("the server's question has no reference")
                readers = collector.collect(layer, split_reference(reference, collector.readers(layer)))
                return moment_parts(readers, self._method), moment_sums(readers)
            case messages.FISHER:
                rng = torch.Generator().manual_seed(data.seed)
                parts = fisher_parts(model, self._layers)
                paths = [part.name for part in parts]
                logits_only = not is_language_model(model)
                return parts, fisher_sums(model, paths, data.batches, rng, logits_only, data.shift_invariant)[0]
            case _:
                model = copy.deepcopy(model)
                reestimate_batch_norms(model, data.batches)
                means = norm_statistics(model)
                return norm_parts(model), {
                    name: mean.to(torch.float64) * len(data.batches) for name, mean in means.items()
                }

    def _half(self, client_id: int, half: int) -> Calibration:
        """Return every other one of a client's calibration examples, or the rest."""
        data = self.calibration(client_id)
        batches = choose_half(data.batches, half)
        if not batches:
            raise ProtocolError(f"the server asks for half of {data.num_examples} examples")
        return replace(data, batches=batches, labels=[])

    def _collector(self, client_id: int, half: int, data: Calibration, layer: int) -> Collector:
        """Return the collector of activations up to this layer at most."""
        last, collector = self._collectors.get((client_id, half), (layer + 1, None))
        if collector is None or last > layer:
            dense = self._initial if self._method.corrects else None
            collector = Collector(self._states.model, dense, self._layers, data.batches, self._norms)
        self._collectors[client_id, half] = layer, collector
        return collector

    # ---- states of the model
    def _first_state(self) -> ModelStates:
        self._collectors.clear()
        return ModelStates(cut_model(self._initial, self._spec, {}).eval(), self._layers, self._norms, self._method)

    def _signature(self, layers: Sequence[int]) -> Signature:
        if any(not 0 <= layer < len(self._layers) for layer in layers):
            raise ValueError(f"layers {list(layers)} are not in [0, {len(self._layers)})")
        return self._states.signature(layers)

    def _reach(self, request: Request, folder: Path) -> bool:
        """Bring the model to the requested state and store it; return False if it cannot be reached."""
        wanted = {request.base, request.state}
        if self._states.name not in wanted:
            self._states = self._first_state()
            self._load(folder, wanted)
        if self._states.name not in wanted and self._start_from(folder / _MODEL):
            self._load(folder, wanted)
        if self._states.name == request.base:
            self._states.take(request.layers, request.tensors)
        if self._states.name != request.state:
            return False
        self._save(folder, request)
        return True

    @torch.no_grad()
    def _start_from(self, file: Path) -> bool:
        """Begin with the model that the server has sent; return False where it has sent none that is whole."""
        if not file.is_file():
            return False
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            log.warning("%s is damaged (%s); the server is asked for what it held", file, one_line(error))
            return False
        live = state_tensors(self._initial)
        if {name: tensor.shape for name, tensor in tensors.items()} != {n: t.shape for n, t in live.items()}:
            return False
        for name, tensor in live.items():
            tensor.copy_(tensors[name])
        merge_adapters(self._initial)
        self._states = self._first_state()
        return True

    def _load(self, folder: Path, wanted: set[bytes]) -> None:
        """Apply the changes stored in a folder, up to the first wanted state.

        Files of another run and damaged ones lead to other states: the server then sends all changes again.
        """
        for file in sorted(folder.glob(_FILES)):
            if self._states.name in wanted:
                return
            layer = int(file.name[len("layer-") :].partition(".")[0])
            try:
                tensors = load_file(file)
            except (OSError, SafetensorError) as error:
                log.warning("%s is damaged (%s); the server is asked for what it held", file, one_line(error))
                return
            shapes = {name: shape for name, shape, _ in self._signature([layer])}
            if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
                return
            self._states.take([layer], tensors)

    def _save(self, folder: Path, request: Request) -> None:
        """Store the changes of a request; changes from the first state on replace all others."""
        if request.base == self._states.names[0]:
            for file in folder.glob(_FILES):
                file.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        for layer in request.layers:
            names = [name for name, _, _ in self._signature([layer])]
            path = folder / f"layer-{layer:06d}.safetensors"
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file({name: request.tensors[name].contiguous() for name in names}, partial)
            partial.replace(path)
