"""Pruned classifier on disk: compact weights, and their units of the whole architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedlp.errors import CheckpointError, ConfigError, one_line
from fedlp.models.spec import state_tensors
from fedlp.pruning.tracing.widths import WidthSpec, cut_model
from fedlp.types import Keep

_WEIGHTS, _WIDTHS = "model.safetensors", "widths.json"


def save_classifier(
    model: nn.Module,
    spec: WidthSpec,
    widths: Mapping[str, Keep],
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a cut classifier: ``model.safetensors`` and ``widths.json``.

    Parameters
    ----------
    model : nn.Module
        The cut model; layers may have got a bias.
    spec : WidthSpec
        Axes of the whole model.
    widths : mapping from axis name to Keep
        Kept units; absent axes are whole.
    folder : Path
        Made if absent. ``widths.json`` has for every axis its ``size`` in units and the units that are kept, ``keep``,
        as runs ``[start, stop)``.
    dtype : torch.dtype
        Floating-point format of the file.

    Raises
    ------
    CheckpointError
        If the folder cannot be written.
    """
    axes = {}
    for axis, size in spec.axes.items():
        keep = widths.get(axis, Keep.full(size))
        axes[axis] = {"size": size, "keep": [list(run) for run in keep.runs]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _WIDTHS).write_text(json.dumps({"axes": axes}, indent=1) + "\n")
        save_file(stored_tensors(model, dtype), folder / _WEIGHTS)
    except OSError as error:
        raise CheckpointError(f"the model cannot be written to {folder}: {one_line(error)}") from error


def load_classifier(model_whole: nn.Module, spec: WidthSpec, folder: Path) -> nn.Module:
    """Return the classifier that :func:`save_classifier` wrote.

    Parameters
    ----------
    model_whole : nn.Module
        Model of the uncut architecture, with any weights; not modified.
    spec : WidthSpec
        Its axes.
    folder : Path
        Folder with ``model.safetensors`` and ``widths.json``.

    Returns
    -------
    nn.Module
        The cut model with the weights of the folder, on the device and in the dtypes of ``model_whole``, in evaluation
        mode.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged or of another architecture; names it and the difference.
    """
    widths = _read_widths(folder / _WIDTHS, spec)
    path = folder / _WEIGHTS
    try:
        stored: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    model = cut_model(model_whole, spec, widths)
    _add_biases(model, stored)
    own = state_tensors(model)
    odd = next((name for name in [*own, *stored] if name not in own or name not in stored), None)
    if odd is not None:
        where = "the model" if odd in stored else str(path)
        raise CheckpointError(f"{path} is of another model: {where} has no tensor {odd}")
    for name, tensor in own.items():
        found = stored[name]
        kinds_agree = found.dtype == tensor.dtype or (found.is_floating_point() and tensor.is_floating_point())
        if found.shape != tensor.shape or not kinds_agree:
            raise CheckpointError(
                f"{path} is of another model: {name} is {_kind(found)} there, {_kind(tensor)} in the model cut to "
                f"{_WIDTHS}"
            )
        tensor.copy_(found)
    return model.eval()


def stored_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a model's tensors for the file: contiguous, floating-point ones in one dtype."""
    tensors = state_tensors(model)
    return {name: (t.to(dtype) if t.is_floating_point() else t).contiguous() for name, t in tensors.items()}


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round floating-point tensors to the numbers of a dtype, in place: the model then equals the file.

    Raises
    ------
    ConfigError
        If a number is beyond the range of the dtype; names the tensor.
    """
    for name, tensor in state_tensors(model).items():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            rounded = tensor.to(dtype)
            if bool((rounded.isinf() & tensor.isfinite()).any()):
                kind = str(dtype).removeprefix("torch.")
                raise ConfigError(f"{name} has a number beyond the range of {kind}; set dtype=bfloat16 or float32")
            tensor.copy_(rounded)


def _read_widths(path: Path, spec: WidthSpec) -> dict[str, Keep]:
    try:
        axes: dict[str, Any] = json.loads(path.read_text())["axes"]
        sizes = {axis: entry["size"] for axis, entry in axes.items()}
        widths = {axis: Keep(entry["size"], _runs(entry["keep"])) for axis, entry in axes.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}, {one_line(error)}") from error
    for axis in [*spec.axes, *sizes]:
        if sizes.get(axis) != spec.axes.get(axis):
            raise CheckpointError(
                f"{path} is of another model: axis {axis} has {sizes.get(axis, 'no')} units there, "
                f"{spec.axes.get(axis, 'no')} in the model"
            )
        if not widths[axis].count and axis not in spec.branches:
            raise CheckpointError(f"{path} keeps no unit of axis {axis}; trace the model's axes with depth=True")
    return widths


def _runs(runs: list[list[int]]) -> tuple[tuple[int, int], ...]:
    if any(type(end) is not int for start, stop in runs for end in (start, stop)):
        raise TypeError("runs are pairs of whole numbers")
    return tuple((start, stop) for start, stop in runs)


def _add_biases(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Add the biases of pruning to layers; values are loaded later."""
    for path, module in model.named_modules():
        is_layer = isinstance(module, nn.Linear | nn.Conv2d)
        if is_layer and module.bias is None and f"{path}.bias" in stored:
            module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)))


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
