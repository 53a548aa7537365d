"""Activation memory of a training step as a function of a model's widths."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedlp.models.forward import forward_logits, run_copy
from fedlp.models.spec import named_tensors
from fedlp.pruning.costs.footprint import Footprint
from fedlp.pruning.tracing.units import is_reader, is_transposed
from fedlp.pruning.tracing.widths import WidthSpec

_BATCH = 2  # batch statistics need two


def activation_footprint(model: nn.Module, spec: WidthSpec, inputs: Tensor) -> Footprint:
    """Return the bytes saved by autograd for one training example, up to the loss: a polynomial in the units kept.

    Measured once on the whole model, on shapes alone. The saved input of a layer that reads an axis scales with
    that axis; anything else with the axis on which the last layer before it wrote, or else with the presence of the
    branch that it is saved in. Storage that is kept twice counts once, and weights do not count.

    Parameters
    ----------
    inputs : (batch, ...)
        Only the shape of one example matters.
    """
    example = inputs[:1].repeat(_BATCH, *[1] * (inputs.dim() - 1))  # a copy: an expanded storage is too small
    found = run_copy(model, example, lambda copied, batch: _kept_storage(copied, batch, spec), "cpu")
    footprint = Footprint(model, spec, {})
    for axis, branch, size in found:
        footprint.add(axis, size / _BATCH / (1 if axis is None else spec.axes[axis]), branch)
    return footprint


def _kept_storage(model: nn.Module, batch: Tensor, spec: WidthSpec) -> list[tuple[str | None, str | None, float]]:
    """Return the axis, the branch and the bytes of each storage that a training step of a model keeps."""
    tensors = named_tensors(model)
    names = {id(tensor): name for name, tensor in tensors.items()}
    own = {_storage(tensor) for tensor in tensors.values()}
    sizes: dict[int, float] = {}
    axes: dict[int, str | None] = {}
    branches: dict[int, str | None] = {}
    within: list[str | None] = [None]  # last is the branch that is running
    held: list[Tensor] = []  # so that no storage takes another's place
    reading: list[str | None] = []
    written: list[str | None] = [None]

    def pack(tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in own and tensor.dim() > 1:  # statistics of a batch have one dimension
            held.append(tensor)
            sizes[key] = float(tensor.untyped_storage().nbytes())
            axes[key] = reading[-1] if reading else axes.get(key, written[-1])
            branches.setdefault(key, within[-1])
        return tensor

    def leave(writes: str | None) -> None:
        reading.pop()
        written.append(writes)

    for module in [module for module in model.modules() if _weighs(module, names)]:
        reads, writes = _axes(module, spec, names[id(module.weight)])
        module.register_forward_pre_hook(lambda *_, axis=reads: reading.append(axis))
        module.register_forward_hook(lambda *_, axis=writes: leave(axis))
        branch, ends = spec.branch_of.get(names[id(module.weight)]), is_reader(module) and reads in spec.branches
        if branch is not None:
            module.register_forward_pre_hook(lambda *_, branch=branch: within.append(branch))
        if ends:
            module.register_forward_hook(lambda *_: within.append(None))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = forward_logits(model.train(), batch)
        logits.flatten(0, -2).log_softmax(dim=-1)
    return [(axes[key], branches[key], size) for key, size in sizes.items()]


def _weighs(module: nn.Module, names: Mapping[int, str]) -> bool:
    return id(getattr(module, "weight", None)) in names


def _axes(module: nn.Module, spec: WidthSpec, name: str) -> tuple[str | None, str | None]:
    """Return the axes that a layer reads and writes."""
    dims = spec.dims.get(name)
    if dims is None:
        return None, None
    if is_reader(module):
        return dims[1 - is_transposed(module)].axis, dims[is_transposed(module)].axis
    return (None, dims[1].axis) if isinstance(module, nn.Embedding) else (dims[0].axis, dims[0].axis)


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
