"""Client side of a federated search: the divergences of plans on the client's own examples.

Refits come once; they lie on the client's disk under their digest, so that any process can answer any question. A
client that has lost them says so, and is sent them again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flwr.app import RecordDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedlp.errors import DataError, ProtocolError, one_line
from fedlp.federation.oneshot import messages
from fedlp.federation.oneshot.messages import Part, Request
from fedlp.federation.oneshot.model import digest_state
from fedlp.federation.oneshot.plans import decode_plans, judgement_parts
from fedlp.federation.oneshot.settings import OneShotSettings, Share
from fedlp.federation.wire.packing import Signature
from fedlp.pruning.refitted_model import RefittedModel, refit_signature
from fedlp.pruning.tracing.widths import WidthSpec, cut_model
from fedlp.types import PrunableLayer

log = logging.getLogger("fedlp")

_FILE = "refits.safetensors"


class PlanJudge:
    """Judge of plans in a client process, for any client.

    Parameters
    ----------
    dense : nn.Module
        Not modified.
    name : bytes
        Its digest.
    labels : int
        Labels of each example.
    batches_of : callable
        Returns a client's batches of a share of its examples.
    """

    def __init__(
        self,
        settings: OneShotSettings,
        dense: nn.Module,
        name: bytes,
        spec: WidthSpec,
        layers: Sequence[PrunableLayer],
        norms: Mapping[str, str],
        labels: int,
        batches_of: Callable[[int, Share], Sequence[Tensor]],
    ) -> None:
        self.name = name
        self._settings, self._dense, self._spec = settings, dense, spec
        self._layers, self._norms, self._labels, self._batches_of = layers, norms, labels, batches_of
        self._refits: Signature = refit_signature(dense, layers, settings.dtype)
        self._held: tuple[bytes, RefittedModel] | None = None

    def answer(self, content: RecordDict, client_id: int, folder: Path) -> RecordDict:
        """Return the records that answer a request; ProtocolError if it cannot be read."""
        if not self._reach(request := self._decode(content), folder):
            return messages.encode_lack()
        parts, sums, num_examples = self._judge(request, client_id)
        return messages.encode_sums(sums, parts, 0, num_examples, self._settings.dtype)

    def measure(
        self, content: RecordDict, client_id: int, folder: Path
    ) -> tuple[list[Part], Mapping[str, Tensor], int]:
        """Return the parts of a judgement, its sums, and of how many examples they are; DataError without refits."""
        if not self._reach(request := self._decode(content), folder):
            raise DataError(f"client {client_id} has lost the refits of the search; it needs them again")
        return self._judge(request, client_id)

    def _decode(self, content: RecordDict) -> Request:
        return messages.decode_request(content, messages.JUDGE, (), lambda _: self._refits)

    def _judge(self, request: Request, client_id: int) -> tuple[list[Part], dict[str, Tensor], int]:
        assert self._held is not None
        try:
            plans, share = decode_plans(request.question.plans, self._layers), Share(request.question.share)
        except ValueError as error:
            raise ProtocolError(f"the server's question cannot be read: {error}") from error
        batches = self._batches_of(client_id, share)
        parts = judgement_parts(len(plans), self._labels)
        sums = {parts[0].name: self._held[1].divergences(batches, plans)}
        return parts, sums, sum(map(len, batches))

    def _reach(self, request: Request, folder: Path) -> bool:
        """Hold the requested refits, and store those that came; return False if they are not at hand."""
        state, file = request.state, folder / _FILE
        if request.base != self.name:
            return False
        if request.layers:
            if digest_state(self.name, request.tensors) != state:
                return False
            folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.partial")
            save_file(dict(request.tensors), partial)
            partial.replace(file)
        if self._held is not None and self._held[0] == state:
            return True
        came = {name: tensor.clone() for name, tensor in request.tensors.items()}  # out of the message's memory
        refits = came or self._load(file, state)
        if refits is None:
            return False
        model = cut_model(self._dense, self._spec, {}).eval()
        try:
            self._held = state, RefittedModel(model, self._layers, self._norms, self._settings.method, refits)
        except ValueError as error:
            raise ProtocolError(f"the server's refits cannot be used: {error}") from error
        return True

    def _load(self, file: Path, state: bytes) -> dict[str, Tensor] | None:
        """Return stored refits of a digest; None where there are none that are whole."""
        if not file.is_file():
            return None
        try:
            stored = load_file(file)
        except (OSError, SafetensorError) as error:
            log.warning("%s is damaged (%s); the server is asked for what it held", file, one_line(error))
            return None
        shapes = {name: (shape, dtype) for name, shape, dtype in self._refits}
        if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()} != shapes:
            return None
        ordered = {name: stored[name] for name in shapes}
        return ordered if digest_state(self.name, ordered) == state else None
