"""ONNX export."""

from __future__ import annotations

import importlib.util
import io
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlp.errors import ConfigError, one_line
from fedlp.models.spec import state_tensors
from fedlp.pruning.tracing.decoder import is_language_model

_MAX_ONNX_BYTES = 2**31 - 2**27  # of weights in one file; more lie beside it


class _Logits(nn.Module):
    """Wrapper of a model that returns only the logits."""

    def __init__(self, model: nn.Module, is_language: bool) -> None:
        super().__init__()
        self.model = model
        self.is_language = is_language

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs, use_cache=False).logits if self.is_language else self.model(inputs)
        return logits


def export_onnx(model: nn.Module, example_inputs: Tensor, path: Path) -> None:
    """Write a model as ONNX: ``input_ids`` or ``images`` in, ``logits`` out.

    Parameters
    ----------
    model : nn.Module
        A classifier or a causal language model; exported in evaluation mode, not modified.
    example_inputs : (batch, ...)
        Only their shape and type matter. The batch may differ later, and so may a language model's number of tokens.
    path : Path
        The file. Weights of more than 1.9 GB lie beside it, in ``path`` with ``.data`` at the end.

    Raises
    ------
    ConfigError
        If onnx or onnxscript is not installed, if the model has an operation without a counterpart, or if the
        file cannot be written.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'ONNX needs {" and ".join(missing)}; run: pip install "fedlp[export]"')
    program = _to_onnx(model, example_inputs)
    num_bytes = sum(tensor.nbytes for tensor in state_tensors(model).values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(path, external_data=num_bytes > _MAX_ONNX_BYTES)
    except OSError as error:
        raise ConfigError(f"the model cannot be written to {path}: {one_line(error)}") from error


def _to_onnx(model: nn.Module, example_inputs: Tensor) -> Any:
    is_language, name = is_language_model(model), type(model).__name__
    dynamic = {0: "batch", 1: "tokens"} if is_language else {0: "batch"}
    inputs = example_inputs.repeat(2, *[1] * (example_inputs.ndim - 1))  # a batch of one would be taken for fixed
    modes = [(module, module.training) for module in model.modules()]
    try:
        # FutureWarnings are torch's of itself; what it prints on a failure is in the error too.
        with warnings.catch_warnings(action="ignore", category=FutureWarning), redirect_stderr(io.StringIO()):
            program: Any = torch.onnx.export(
                _Logits(model, is_language).eval(),
                (inputs,),
                input_names=["input_ids" if is_language else "images"],
                output_names=["logits"],
                dynamic_shapes=({dim: torch.export.Dim(size) for dim, size in dynamic.items()},),
                verbose=False,
                dynamo=True,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(f"{name} cannot be written as ONNX: {_cause(error)}") from error
    finally:
        for module, training in modes:
            module.training = training
    for dim, size in zip(dynamic.values(), program.model.graph.inputs[0].shape, strict=False):
        if isinstance(size, int):
            raise ConfigError(f"{name} cannot be written as ONNX: its {dim} size is fixed to {size}")
    return program


def _cause(error: BaseException) -> str:
    """Return the first line of the cause of an exporter's error."""
    while isinstance(error, torch.onnx.errors.OnnxExporterError) and error.__cause__ is not None:
        error = error.__cause__
    return one_line(error).partition(";")[0]
