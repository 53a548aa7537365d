"""Forward passes on values or on shapes alone."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedlp.models.threads import one_thread
from fedlp.models.unallocated import allocate

_T = TypeVar("_T")
_MOST_PARAMS, _MOST_MACS = 1 << 24, 1 << 34  # of a model whose passes take less time than importing torch's compiler
_SHORT = 16  # tokens that show what a language model calls


def forward_logits(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Return a model's outputs: (batch, outputs), or logits (batch, tokens, vocabulary) of a causal language model.

    Parameters
    ----------
    inputs : Tensor or mapping
        The batch, or the model's keyword arguments: ``input_ids`` and ``attention_mask``, (batch, tokens). Where the
        mask is 0, the model's own padding token is read.
    """
    outputs: Any = model(inputs) if isinstance(inputs, Tensor) else model(**_with_padding(model, inputs))
    logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return logits


def _with_padding(model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    if not padding or "attention_mask" not in inputs:
        return inputs
    ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, padding)
    return {**inputs, "input_ids": ids}


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextmanager
def shapes_only(model: nn.Module, inputs: Tensor, device: str = "meta") -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield copies of model and inputs with shapes but no values, in a context that can run them.

    Nothing is allocated or computed, and the model is not modified. On every device, the operators that
    run are the same. The first use imports torch's compiler, which takes a second.

    Parameters
    ----------
    device : "meta" or "cpu"
        "cpu" runs the operators of a CPU, whose attention keeps no matrix of weights; "meta" counts all that attention
        multiplies.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()

    def convert(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    memo: dict[int, Any] = {id(p): nn.Parameter(convert(p), p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): convert(buffer) for buffer in model.buffers()}
    shapes, example = copy.deepcopy(model, memo), convert(inputs)
    log = logging.getLogger(FakeTensorMode.__module__)  # prints a traceback of what it then raises
    was_disabled, log.disabled = log.disabled, True
    try:
        with mode:
            yield shapes, example
    finally:
        log.disabled = was_disabled


def is_small(num_params: int, inputs: Tensor) -> bool:
    """Return whether a pass of a model on one of its inputs takes less time than a first pass on shapes.

    The bound on multiply-accumulates is of every parameter used at every place of the input.
    """
    places = math.prod(inputs.shape[2:]) if inputs.is_floating_point() else inputs.shape[-1]
    return num_params <= _MOST_PARAMS and num_params * places <= _MOST_MACS


def run_copy(model: nn.Module, inputs: Tensor, run: Callable[[nn.Module, Tensor], _T], device: str = "meta") -> _T:
    """Return ``run(model, inputs)`` of copies that have shapes but no values; of copies with values where it fails.

    It fails where operators need values: those of a mixture of experts, say. Small models on a CPU are copied with
    values at once. torch's generators are left as they were. ``device`` is that of :func:`shapes_only`.
    """
    if device == "meta" and _is_small_on_cpu(model, inputs):
        return _run_values(model, inputs, run)
    try:
        with shapes_only(model, inputs, device) as (shapes, example):
            return run(shapes, example)
    except Exception:  # whatever operators raise that find no values
        return _run_values(model, inputs, run)


def _is_small_on_cpu(model: nn.Module, inputs: Tensor) -> bool:
    places = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    return places <= {"cpu"} and is_small(sum(x.numel() for x in model.parameters()), inputs)


def _run_values(model: nn.Module, inputs: Tensor, run: Callable[[nn.Module, Tensor], _T]) -> _T:
    """Return ``run(model, inputs)`` of copies with values; those of parameters without memory are zero."""
    copied = copy.deepcopy(model)
    if any(parameter.is_meta for parameter in copied.parameters()):
        allocate(copied)
        torch._foreach_zero_([parameter.detach() for parameter in copied.parameters()])
    place = next((tensor.device for tensor in copied.state_dict().values()), inputs.device)
    with one_thread(), torch.random.fork_rng(devices=[]):
        return run(copied, inputs.to(place))


def run_and_note(model: nn.Module, inputs: Tensor) -> tuple[int, list[str]]:
    """Return the number of outputs of a model, and the paths of the called modules, in order."""
    called: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: called.append(path))
    return forward_logits(model, inputs).shape[-1], called


def short_example(input_shape: tuple[int, ...], reads_tokens: bool) -> Tensor:
    """Return one example of zeros: full images, a few tokens of text."""
    if reads_tokens:
        return torch.zeros((1, min(input_shape[0], _SHORT)), dtype=torch.int64)
    return torch.zeros((1, *input_shape))
