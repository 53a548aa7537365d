"""Shared state of server and clients in federated one-shot pruning: model states, and parts of the sums.

Each state of the model has a digest: of the model at first, then of the state before and the changes. Equal
digests mean equal weights, so a request can name its base and target state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fedlp.errors import ProtocolError
from fedlp.federation.oneshot.messages import Part
from fedlp.federation.wire.packing import Signature, pack_tensors
from fedlp.models.forward import forward_logits
from fedlp.models.spec import state_tensors
from fedlp.pruning.kernels.hessian import Moments
from fedlp.pruning.reader_layers import Method, Reader
from fedlp.pruning.tracing.units import input_columns, weight_matrix
from fedlp.types import PrunableLayer

_BatchNorm = nn.modules.batchnorm._BatchNorm


class States(Protocol):
    """States of what clients hold, as requests name them."""

    changed: list[int]
    names: list[bytes]
    layers: Sequence[PrunableLayer]

    @property
    def name(self) -> bytes:
        """Digest of the present state."""

    def tensors(self, layers: Sequence[int]) -> Mapping[str, Tensor]:
        """Return the tensors of some changes."""


class ModelStates:
    """Model whose layers are rewritten one after another, with the digest of every state so far.

    Parameters
    ----------
    model : nn.Module
        Modified by :meth:`take`, or by its owner before :meth:`note`.
    norms : mapping from path to path
        The batch norms that follow readers.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[PrunableLayer], norms: Mapping[str, str], method: Method
    ) -> None:
        self.model, self.layers, self.norms, self.method = model, layers, norms, method
        self.changed: list[int] = []  # layers, in order; after the first n of them the state is names[n]
        self.names = [digest_state(b"", state_tensors(model))]

    @property
    def name(self) -> bytes:
        """Digest of the present state."""
        return self.names[-1]

    def signature(self, layers: Sequence[int]) -> Signature:
        """Return name, shape and dtype of all tensors that rewriting these layers may change."""
        found = []
        for path in [path for number in layers for path in self.layers[number].readers]:
            weight: Tensor = self.model.get_submodule(path).weight  # type: ignore[assignment]
            found.append((f"{path}.weight", tuple(weight.shape), weight.dtype))
            if not self.method.adds_bias:
                continue
            outputs = (len(weight_matrix(self.model.get_submodule(path))),)
            if path not in self.norms:
                found.append((f"{path}.bias", outputs, weight.dtype))
            elif self.method.keeps_batch_norm:
                found.append((f"{self.norms[path]}.running_mean", outputs, torch.float32))
        return found

    def tensors(self, layers: Sequence[int]) -> dict[str, Tensor]:
        """Return the present values of all tensors that rewriting these layers may have changed."""
        return {name: _find(self.model, name) for name, _, _ in self.signature(layers)}

    def note(self, layer: int) -> None:
        """Record the digest of the state after this layer was rewritten."""
        self.names.append(digest_state(self.name, self.tensors([layer])))
        self.changed.append(layer)

    @torch.no_grad()
    def take(self, layers: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Apply the changes of these layers."""
        for layer in layers:
            for name, _, dtype in self.signature([layer]):
                path, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(path)
                if getattr(module, leaf, None) is None:
                    device = next(module.parameters()).device
                    module.register_parameter(leaf, nn.Parameter(tensors[name].to(device, dtype, copy=True)))
                else:
                    _find(self.model, name).copy_(tensors[name])
            self.note(layer)


def count_positions(model: nn.Module, layers: Sequence[PrunableLayer], example: Tensor) -> tuple[dict[str, int], int]:
    """Return the number of input vectors per example of each reader, by path, and its number of labels."""
    found: dict[str, int] = {}
    handles = []
    for path in [path for layer in layers for path in layer.readers]:

        def count(module: nn.Module, inputs: tuple[Tensor, ...], _: object, path: str = path) -> None:
            found[path] = len(input_columns(module, inputs[0]))

        handles.append(model.get_submodule(path).register_forward_hook(count))
    with torch.no_grad():
        labels = len(forward_logits(model, example[:1]).flatten(0, -2))
    for handle in handles:
        handle.remove()
    return found, labels


# ---- what is summed
def moment_parts(readers: Sequence[Reader], method: Method, vectors: Mapping[str, int] | None = None) -> list[Part]:
    """Return the parts of the second moments of a layer's readers: the matrix, or its diagonal if sufficient.

    Parameters
    ----------
    vectors : mapping from path to int, optional
        Input vectors that one example gives each reader.
    """
    parts = []
    for reader in readers:
        path, size = reader.path, len(reader.moments.total)
        total, per_example = f"{path}.total", (vectors or {}).get(path, 0)
        gram = (
            Part(f"{path}.gram", (size, size), True, False, total, per_example)
            if method.needs_moments
            else Part(f"{path}.diagonal", (size,), False, True, total, per_example)
        )
        parts += [Part(f"{path}.total", (size,)), gram]
        if reader.moments.cross is not None:
            outputs = len(reader.moments.cross)
            parts += [Part(f"{path}.target_total", (outputs,)), Part(f"{path}.cross", (outputs, size))]
    return parts


def moment_sums(readers: Sequence[Reader]) -> dict[str, Tensor]:
    """Return the sums of :func:`moment_parts`."""
    sums: dict[str, Tensor] = {}
    for reader in readers:
        path, moments = reader.path, reader.moments
        sums |= {f"{path}.total": moments.total, f"{path}.gram": moments.gram}
        sums[f"{path}.diagonal"] = moments.gram.diagonal()
        if moments.cross is not None and moments.target_total is not None:
            sums |= {f"{path}.target_total": moments.target_total, f"{path}.cross": moments.cross}
    return sums


def read_moments(path: str, sums: Mapping[str, Tensor], count: int, origin: Tensor) -> Moments:
    """Return a reader's moments from sums over ``count`` input vectors that were measured from ``origin``, (n,)."""
    diagonal = sums.get(f"{path}.diagonal")
    gram = sums[f"{path}.gram"] if diagonal is None else diagonal.diag()
    targets = sums.get(f"{path}.target_total"), sums.get(f"{path}.cross")
    moments = Moments(count, sums[f"{path}.total"], gram, *targets).shifted(-origin)
    moments.gram.diagonal().clamp_(min=0.0)  # of a unit that is never active, rounding leaves something
    return moments


def split_reference(reference: Tensor, readers: Sequence[Reader]) -> dict[str, Tensor]:
    """Return the origin of each reader's inputs, float64, by path.

    Parameters
    ----------
    reference : (n,)
        Of all readers, one after the other. Near the mean of the inputs, it leaves float32 the digits that count.
    """
    sizes = [len(reader.moments.total) for reader in readers]
    if len(reference) != sum(sizes):
        raise ProtocolError(f"the reference has {len(reference)} entries, not {sum(sizes)}")
    parts = torch.split(reference.to(readers[0].moments.total), sizes)
    return {reader.path: part for reader, part in zip(readers, parts, strict=True)}


def fisher_parts(model: nn.Module, layers: Sequence[PrunableLayer]) -> list[Part]:
    """Return the parts of the Fisher information of all readers' outputs."""
    paths = [path for layer in layers for path in layer.readers]
    sizes = {path: len(weight_matrix(model.get_submodule(path))) for path in paths}
    return [Part(path, (size, size), symmetric=True) for path, size in sizes.items()]


def norm_parts(model: nn.Module) -> list[Part]:
    """Return the parts of batch norms' input statistics: means and variances by batch."""
    return [
        Part(name, tuple(tensor.shape), nonnegative=name.endswith("running_var"))
        for name, tensor in norm_statistics(model).items()
    ]


def norm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running means and variances of all batch norms, live."""
    norms = {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {
        f"{path}.{name}": getattr(norm, name)
        for path, norm in norms.items()
        for name in ("running_mean", "running_var")
        if norm.track_running_stats
    }


def _find(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor.detach()


def digest_state(before: bytes, tensors: Mapping[str, Tensor]) -> bytes:
    """Return the digest of the state that tensors make of the one before."""
    found = hashlib.sha256(before)
    for dtype, (_, image) in pack_tensors(tensors).items():
        found.update(dtype.encode())
        found.update(image)
    return found.digest()[:16]
